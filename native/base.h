/* What every file needs: bounded buffers, strings that live for one request, small wrappers. */
#ifndef ISOLAT_BASE_H
#define ISOLAT_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define LEN(a) (sizeof(a) / sizeof((a)[0]))

typedef struct {
    const uint8_t *p;
    size_t n;
} Span;

/* Bytes that are taken from the front and added at the end. Freed when empty and large. */
typedef struct {
    uint8_t *p;
    size_t at, len, cap; /* valid: p[at..len) */
} Buf;

void die(const char *what) __attribute__((noreturn));
void *xalloc(size_t n); /* zeroed */
int64_t now_ns(void);  /* since the epoch */
int64_t ticks_ms(void); /* monotonic */
void sleep_ms(int ms);

uint8_t *buf_room(Buf *b, size_t n); /* at least n free bytes at the end */
void buf_add(Buf *b, const void *p, size_t n);
void buf_take(Buf *b, size_t n);
void buf_free(Buf *b);
static inline size_t buf_size(const Buf *b) { return b->len - b->at; }
static inline Span buf_span(const Buf *b) { return (Span){b->p + b->at, b->len - b->at}; }

/* Strings of the request that is being handled; request_end() frees them all. */
char *request_text(Span s);
void *request_alloc(size_t n);
void request_end(void);

void close_fd(int *fd);
int move_high(int fd); /* the same descriptor above 9, close-on-exec; closes the old one */
bool write_all(int fd, const void *p, size_t n);
bool write_file(const char *path, const char *text); /* an existing file, in one write */
ssize_t read_small(const char *path, char *into, size_t size); /* regular files only; terminates; -1 with errno */
int mkdir_p(const char *path, mode_t mode);
bool is_mount_root(int dirfd, const char *path);

#endif
