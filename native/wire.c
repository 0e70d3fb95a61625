#include "wire.h"

#include <string.h>

uint32_t get_u32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void put_u32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (8 * i));
}

bool wire_header(const uint8_t h[HEADER_BYTES], size_t *body, Frame *f)
{
    *body = get_u32(h);
    f->kind = h[4];
    f->nfds = h[6] | h[7] << 8;
    f->id = get_u32(h + 8);
    return *body <= MAX_BODY && !h[5] && f->nfds <= MAX_FDS;
}

void wire_pack_header(uint8_t h[HEADER_BYTES], const Frame *f)
{
    put_u32(h, (uint32_t)f->body.n);
    h[4] = f->kind;
    h[5] = 0;
    h[6] = (uint8_t)f->nfds;
    h[7] = 0;
    put_u32(h + 8, f->id);
}

bool wire_raw(uint8_t kind) { return kind == K_DATA || kind == K_EOF || kind == K_CREDIT; }

bool field_next(Span *rest, uint8_t *tag, Span *value)
{
    if (rest->n < 5)
        return false;
    size_t n = get_u32(rest->p + 1);
    if (n > rest->n - 5)
        return false;
    *tag = rest->p[0];
    *value = (Span){rest->p + 5, n};
    *rest = (Span){rest->p + 5 + n, rest->n - 5 - n};
    return true;
}

static bool is_int(uint8_t tag)
{
    switch (tag) {
    case T_FLAGS: case T_ROWS: case T_COLS: case T_SIGNAL: case T_SCOPE: case T_COUNT: case T_CODE: case T_ERRNO:
    case T_MODE: case T_OFFSET: case T_SIZE: case T_OP: case T_UID: case T_GID: case T_PID: case T_STATE: case T_TIME:
    case T_VERSION:
    case T_STREAM:
    case T_SPACES:
    case T_PARK:
    case T_GRACE:
        return true;
    default:
        return false;
    }
}

static bool is_nested(uint8_t tag) { return tag == T_STEP || tag == T_WRITE || tag == T_LINE || tag == T_PROC; }

static bool value_valid(uint8_t tag, Span value, int depth);

static bool valid_at(Span rest, int depth)
{
    uint8_t tag;
    Span value;
    while (field_next(&rest, &tag, &value))
        if (!value_valid(tag, value, depth))
            return false;
    return rest.n == 0;
}

static bool value_valid(uint8_t tag, Span value, int depth)
{
    if (is_int(tag))
        return value.n == 8;
    if (is_nested(tag))
        return depth < 3 && valid_at(value, depth + 1);
    if (tag > T_HOST || tag == T_DATA || tag == T_TAIL)
        return true;
    return !memchr(value.p, 0, value.n); /* a NUL would cut a path or an argument short */
}

bool wire_valid(Span body) { return valid_at(body, 0); }

bool field_each(Span *rest, uint8_t tag, Span *value)
{
    uint8_t found;
    Span v;
    while (field_next(rest, &found, &v))
        if (found == tag) {
            *value = v; /* untouched where there is none */
            return true;
        }
    return false;
}

bool field_find(Span body, uint8_t tag, Span *value) { return field_each(&body, tag, value); }

int64_t span_int(Span value)
{
    uint64_t v = 0;
    for (size_t i = 0; i < 8 && i < value.n; i++)
        v |= (uint64_t)value.p[i] << (8 * i);
    return (int64_t)v;
}

int64_t field_int(Span body, uint8_t tag, int64_t otherwise)
{
    Span value;
    return field_find(body, tag, &value) ? span_int(value) : otherwise;
}

char *field_text(Span body, uint8_t tag)
{
    Span value = {0};
    field_find(body, tag, &value);
    return request_text(value);
}

char **field_list(Span body, uint8_t tag)
{
    Span rest = body, value;
    size_t n = 0;
    while (field_each(&rest, tag, &value))
        n++;
    char **list = request_alloc((n + 1) * sizeof *list);
    rest = body;
    for (size_t i = 0; field_each(&rest, tag, &value); i++)
        list[i] = request_text(value);
    return list;
}

void put_bytes(Buf *b, uint8_t tag, const void *p, size_t n)
{
    uint8_t h[5] = {tag};
    put_u32(h + 1, (uint32_t)n);
    buf_add(b, h, sizeof h);
    buf_add(b, p, n);
}

void put_text(Buf *b, uint8_t tag, const char *text) { put_bytes(b, tag, text, strlen(text)); }

void put_int(Buf *b, uint8_t tag, int64_t v)
{
    uint8_t le[8];
    for (int i = 0; i < 8; i++)
        le[i] = (uint8_t)((uint64_t)v >> (8 * i));
    put_bytes(b, tag, le, sizeof le);
}

size_t put_open(Buf *b, uint8_t tag)
{
    put_bytes(b, tag, NULL, 0);
    return b->len;
}

void put_close(Buf *b, size_t mark) { put_u32(b->p + mark - 4, (uint32_t)(b->len - mark)); }
