#include "base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* musl 1.2.3 has no statx() */
#define IS_MOUNT_ROOT 0x2000
struct status {
    uint32_t mask, block;
    uint64_t attributes, rest[30];
};
#define KEEP_BYTES (72u << 10) /* an empty buffer larger than one DATA frame gives its memory back */

void die(const char *what)
{
    int e = errno;
    dprintf(2, "isolat: %s: %s\n", what, strerror(e));
    _exit(70);
}

/* Everything here is bounded, so that running out of memory means that the machine has none left: no recovery. */
void *xalloc(size_t n)
{
    void *p = calloc(1, n ? n : 1);
    if (!p)
        die("out of memory");
    return p;
}

static int64_t clock_ns(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t now_ns(void) { return clock_ns(CLOCK_REALTIME); }
int64_t ticks_ms(void) { return clock_ns(CLOCK_MONOTONIC) / 1000000; }

void sleep_ms(int ms)
{
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

uint8_t *buf_room(Buf *b, size_t n)
{
    if (b->at && b->cap - b->len < n) {
        memmove(b->p, b->p + b->at, b->len - b->at);
        b->len -= b->at;
        b->at = 0;
    }
    if (b->cap - b->len < n) {
        size_t cap = b->len + n;
        if (cap < b->cap * 2 && b->cap < KEEP_BYTES)
            cap = b->cap * 2;
        uint8_t *p = realloc(b->p, cap);
        if (!p)
            die("out of memory");
        b->p = p;
        b->cap = cap;
    }
    return b->p + b->len;
}

void buf_add(Buf *b, const void *p, size_t n)
{
    if (!n)
        return;
    memcpy(buf_room(b, n), p, n);
    b->len += n;
}

void buf_take(Buf *b, size_t n)
{
    b->at += n;
    if (b->at < b->len)
        return;
    b->at = b->len = 0;
    if (b->cap > KEEP_BYTES)
        buf_free(b);
}

void buf_free(Buf *b)
{
    free(b->p);
    *b = (Buf){0};
}

typedef struct Chunk {
    struct Chunk *next;
    max_align_t data[];
} Chunk;
static Chunk *chunks;

void *request_alloc(size_t n)
{
    Chunk *c = xalloc(sizeof *c + n);
    c->next = chunks;
    chunks = c;
    return c->data;
}

char *request_text(Span s)
{
    char *text = request_alloc(s.n + 1);
    if (s.n)
        memcpy(text, s.p, s.n);
    return text;
}

void request_end(void)
{
    while (chunks) {
        Chunk *next = chunks->next;
        free(chunks);
        chunks = next;
    }
}

void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

int move_high(int fd)
{
    int high = fcntl(fd, F_DUPFD_CLOEXEC, 10);
    if (high >= 0)
        close(fd);
    return high;
}

bool write_all(int fd, const void *p, size_t n)
{
    const char *at = p;
    while (n) {
        ssize_t w = write(fd, at, n);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            return false;
        at += w;
        n -= (size_t)w;
    }
    return true;
}

bool write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return false;
    ssize_t w = write(fd, text, strlen(text));
    int e = errno;
    close(fd);
    errno = e;
    return w >= 0;
}

ssize_t read_small(const char *path, char *into, size_t size)
{
    struct stat st;
    size_t got = 0;
    /* O_NONBLOCK: a FIFO in the place of the file must not hold us */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        errno = EINVAL;
        return -1;
    }
    while (got < size - 1) {
        ssize_t n = read(fd, into + got, size - 1 - got);
        if (n <= 0)
            break;
        got += (size_t)n;
    }
    close(fd);
    into[got] = 0;
    return (ssize_t)got;
}

int mkdir_p(const char *path, mode_t mode)
{
    struct stat st;
    char *copy = strdup(path);
    if (!copy)
        return -1;
    for (char *at = copy + 1; *copy && (at = strchr(at, '/')); at++) {
        *at = 0;
        if (mkdir(copy, 0755) && errno != EEXIST && stat(copy, &st)) {
            free(copy);
            return -1;
        }
        *at = '/';
    }
    free(copy);
    if (!mkdir(path, mode))
        return 0;
    int e = errno;
    if (stat(path, &st)) {
        errno = e == EEXIST ? ENOTDIR : e;
        return -1;
    }
    errno = ENOTDIR;
    return S_ISDIR(st.st_mode) ? 0 : -1;
}

bool is_mount_root(int dirfd, const char *path)
{
    struct status st;
    if (syscall(SYS_statx, dirfd, path, AT_SYMLINK_NOFOLLOW, 0, &st))
        return false;
    return st.attributes & IS_MOUNT_ROOT;
}
