/* Frames and fields: docs/protocol.md, and the numbers of src/isolat/wire/kinds.py. */
#ifndef ISOLAT_WIRE_H
#define ISOLAT_WIRE_H

#include "base.h"

enum {
    WIRE_VERSION = 1,
    HEADER_BYTES = 12,
    MAX_BODY = 1 << 20,
    MAX_DATA = 64 << 10,
    MAX_FDS = 4,
    MAX_NAME = 255, /* a full name of a process */
};

enum {
    K_HELLO = 1, K_STEP, K_SPAWN, K_SIGNAL, K_RESIZE, K_ADOPT, K_PROCS, K_FORGET, K_READ, K_WRITE, K_QUIT,
    K_HOLD, K_FETCH, K_DROP, K_RESUME, K_SETTLE, K_IDLE, K_HUSH,
    K_OK = 32, K_ERROR,
    K_DATA = 48, K_EOF, K_CREDIT, K_EXITED, K_LOST,
};

enum {
    T_KEY = 1, T_TO, T_ARGV, T_ENV, T_CWD, T_USER, T_FLAGS, T_ROWS, T_COLS, T_SIGNAL, T_SCOPE, T_PREFIX, T_COUNT,
    T_CODE, T_ERRNO, T_STAGE, T_MESSAGE, T_TAIL, T_PATH, T_MODE, T_OFFSET, T_SIZE, T_DATA, T_STEP, T_OP, T_SOURCE,
    T_TARGET, T_FSTYPE, T_OPTIONS, T_UID, T_GID, T_WRITE, T_LINE, T_INVERSE, T_PID, T_STATE, T_TIME, T_VERSION,
    T_ROLE, T_PIDFILE, T_ROOT, T_CGROUP, T_PROC, T_STREAM, T_HELD, T_SPACES, T_PARK, T_GRACE, T_HOST,
    T_HOME,
};

enum { F_TTY = 1, F_STDIN = 2, F_CONTROL = 4, F_LAUNCHER = 8, F_LOG = 16, F_MAIN = 32, F_FDS = 64, F_SERIAL = 128,
       F_APART = 256, F_BESIDE = 512, F_CONFINED = 1024, FLAGS_KNOWN = 2047 };
enum { F_TRUNCATE = 1 };
enum { SCOPE_PROCESS, SCOPE_GROUP, SCOPE_ALL };

typedef struct {
    uint8_t kind;
    uint32_t id;
    Span body;
    int nfds;
    int fds[MAX_FDS]; /* whoever keeps one puts -1 in its place; the rest is closed after the frame */
} Frame;

uint32_t get_u32(const uint8_t *p);
void put_u32(uint8_t *p, uint32_t v);
bool wire_header(const uint8_t h[HEADER_BYTES], size_t *body, Frame *f); /* false: malformed */
void wire_pack_header(uint8_t h[HEADER_BYTES], const Frame *f);
bool wire_raw(uint8_t kind);
bool wire_valid(Span body); /* fields in form: nothing overruns, integers have 8 bytes, text has no NUL */

bool field_next(Span *rest, uint8_t *tag, Span *value);
bool field_each(Span *rest, uint8_t tag, Span *value); /* the next one of this tag */
bool field_find(Span body, uint8_t tag, Span *value);
int64_t field_int(Span body, uint8_t tag, int64_t otherwise);
char *field_text(Span body, uint8_t tag); /* "" where it is absent; lives for this request */
char **field_list(Span body, uint8_t tag); /* ends with NULL; lives for this request */
int64_t span_int(Span value);

void put_bytes(Buf *b, uint8_t tag, const void *p, size_t n);
void put_text(Buf *b, uint8_t tag, const char *text);
void put_int(Buf *b, uint8_t tag, int64_t v);
size_t put_open(Buf *b, uint8_t tag); /* a nested field, until put_close */
void put_close(Buf *b, size_t mark);

#endif
