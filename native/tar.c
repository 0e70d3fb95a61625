#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAX_MAX = 4 * TAR_PATH };

/* ustar's header; all in text. */
typedef struct {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, target[100];
    char magic[6], version[2], user[32], group[32], major[8], minor[8], prefix[155], rest[12];
} Header;

_Static_assert(sizeof(Header) == TAR_BLOCK, "a header is a block");

static bool damaged(void)
{
    errno = EBADMSG;
    return false;
}

/* the tape */

/* O_DIRECT: what goes to a disk of ours once and never comes back needs no place in the machine's memory. */
bool tape_open(Tape *t, const char *path, bool writes, uint64_t limit)
{
    int flags = (writes ? O_WRONLY : O_RDONLY) | O_CLOEXEC | O_NOCTTY;
    memset(t, 0, sizeof *t);
    t->limit = limit;
    t->fd = open(path, flags | O_DIRECT);
    if (t->fd < 0 && errno == EINVAL)
        t->fd = open(path, flags);
    return t->fd >= 0 && !posix_memalign((void **)&t->buf, 4096, TAR_CHUNK);
}

/* A file may want other alignments than a disk of ours: then without. */
static bool again(Tape *t, ssize_t n)
{
    int flags = n < 0 && errno == EINVAL ? fcntl(t->fd, F_GETFL) : 0;
    return flags > 0 && flags & O_DIRECT && !fcntl(t->fd, F_SETFL, flags & ~O_DIRECT);
}

static bool refill(Tape *t)
{
    ssize_t n;
    do {
        n = pread(t->fd, t->buf, TAR_CHUNK, (off_t)t->offset);
    } while (again(t, n));
    t->at = t->len = 0;
    if (n <= 0)
        return n < 0 ? false : damaged();
    t->len = (size_t)n;
    t->offset += (uint64_t)n;
    return true;
}

const uint8_t *tape_read(Tape *t, size_t most, size_t *n)
{
    if (t->at == t->len && !refill(t))
        return NULL;
    const uint8_t *p = t->buf + t->at;
    *n = most < t->len - t->at ? most : t->len - t->at;
    t->at += *n;
    return p;
}

static bool copy_out(Tape *t, void *into, size_t n)
{
    uint8_t *to = into;
    while (n) {
        size_t got;
        const uint8_t *p = tape_read(t, n, &got);
        if (!p)
            return false;
        memcpy(to, p, got);
        to += got;
        n -= got;
    }
    return true;
}

bool tape_flush(Tape *t)
{
    for (size_t done = 0; done < t->at;) {
        ssize_t n = pwrite(t->fd, t->buf + done, t->at - done, (off_t)t->offset);
        if (again(t, n))
            continue;
        if (n <= 0)
            return false;
        done += (size_t)n;
        t->offset += (uint64_t)n;
    }
    t->at = 0;
    return true;
}

bool tape_write(Tape *t, const void *p, size_t n)
{
    const uint8_t *from = p;
    if (n > t->limit || t->offset + t->at > t->limit - n) {
        errno = ENOSPC;
        return false;
    }
    while (n) {
        size_t some = n < TAR_CHUNK - t->at ? n : TAR_CHUNK - t->at;
        memcpy(t->buf + t->at, from, some);
        t->at += some;
        from += some;
        n -= some;
        if (t->at == TAR_CHUNK && !tape_flush(t))
            return false;
    }
    return true;
}

/* reading */

/* Octal in text; or, with the first bit set, binary (a common extension, which Python's and GNU's tar know too). */
static bool number(const char *text, size_t n, uint64_t *value)
{
    size_t i = 0;
    *value = 0;
    if (text[0] & 0x80) {
        for (i = 1; i < n; i++)
            *value = *value << 8 | (uint8_t)text[i];
        return n <= 8 || *value >> 63 == 0 || damaged();
    }
    while (i < n && text[i] == ' ')
        i++;
    for (; i < n && text[i] >= '0' && text[i] <= '7'; i++)
        *value = *value << 3 | (uint64_t)(text[i] - '0');
    return i == n || text[i] == 0 || text[i] == ' ' || damaged();
}

static unsigned sum_of(const Header *h)
{
    const uint8_t *p = (const uint8_t *)h;
    unsigned sum = 8 * ' ';
    for (size_t i = 0; i < TAR_BLOCK; i++)
        if (i < offsetof(Header, checksum) || i >= offsetof(Header, type))
            sum += p[i];
    return sum;
}

static bool checked(const Header *h)
{
    uint64_t sum;
    return (number(h->checksum, sizeof h->checksum, &sum) && sum == sum_of(h) && !memcmp(h->magic, "ustar", 5)) ||
           damaged();
}

static bool text_into(char *to, size_t room, const char *from, size_t n)
{
    if (n >= room || memchr(from, 0, n))
        return damaged();
    memcpy(to, from, n);
    to[n] = 0;
    return true;
}

/* SECONDS[.FRACTION] */
static bool time_of(const char *text, size_t n, Entry *e)
{
    char copy[48], *end;
    int64_t ns = 0, unit = 100000000;
    if (!text_into(copy, sizeof copy, text, n))
        return false;
    e->mtime_s = strtoll(copy, &end, 10);
    if (*end == '.')
        for (end++; *end >= '0' && *end <= '9'; end++, unit /= 10)
            ns += (*end - '0') * unit;
    e->mtime_ns = ns;
    return !*end || damaged();
}

static bool decimal(const char *text, size_t n, uint64_t *value)
{
    char copy[32], *end;
    if (!n || *text < '0' || *text > '9' || !text_into(copy, sizeof copy, text, n))
        return damaged();
    errno = 0;
    *value = strtoull(copy, &end, 10);
    return (!*end && !errno) || damaged();
}

typedef struct {
    bool path, target, size, mtime, uid, gid;
} Given;

static bool id_of(const char *text, size_t n, uint32_t *id)
{
    uint64_t value;
    if (!decimal(text, n, &value) || value > UINT32_MAX)
        return damaged();
    *id = (uint32_t)value;
    return true;
}

static bool record(const char *key, size_t nkey, const char *value, size_t n, Entry *e, Given *given)
{
    const struct {
        const char *key;
        bool *given;
    } known[] = {{"path", &given->path}, {"linkpath", &given->target}, {"size", &given->size},
                 {"mtime", &given->mtime}, {"uid", &given->uid},       {"gid", &given->gid}};
    size_t i = 0;
    while (i < LEN(known) && (strlen(known[i].key) != nkey || memcmp(known[i].key, key, nkey)))
        i++;
    if (i == LEN(known)) {
        e->same = e->same || (nkey == 11 && !memcmp(key, "ISOLAT.same", 11));
        return true;
    }
    *known[i].given = true;
    switch (i) {
    case 0: return text_into(e->path, sizeof e->path, value, n);
    case 1: return text_into(e->target, sizeof e->target, value, n);
    case 2: return decimal(value, n, &e->size);
    case 3: return time_of(value, n, e);
    case 4: return id_of(value, n, &e->uid);
    default: return id_of(value, n, &e->gid);
    }
}

/* Records "LENGTH KEY=VALUE\n", LENGTH counting all of itself. */
static bool records(char *text, size_t n, Entry *e, Given *given)
{
    for (char *at = text; at < text + n;) {
        char *end, *space = memchr(at, ' ', (size_t)(text + n - at));
        size_t length = space ? strtoul(at, &end, 10) : 0;
        if (!space || end != space || length < 5 || length > (size_t)(text + n - at) || at[length - 1] != '\n' ||
            space + 1 >= at + length)
            return damaged();
        char *equals = memchr(space + 1, '=', (size_t)(at + length - space - 1));
        if (!equals || !record(space + 1, (size_t)(equals - space - 1), equals + 1, (size_t)(at + length - 2 - equals),
                               e, given))
            return damaged();
        at += length;
    }
    return true;
}

static bool extended(Tape *t, const Header *h, Entry *e, Given *given)
{
    static char text[PAX_MAX + 1];
    uint64_t size;
    if (!number(h->size, sizeof h->size, &size) || size > PAX_MAX)
        return damaged();
    text[size] = 0;
    return copy_out(t, text, (size_t)size) && tar_skip(t, -size & (TAR_BLOCK - 1)) &&
           (h->type != 'x' || records(text, (size_t)size, e, given));
}

static void name_of(const Header *h, Entry *e)
{
    size_t n = strnlen(h->name, sizeof h->name), m = strnlen(h->prefix, sizeof h->prefix);
    memcpy(e->path, h->prefix, m);
    if (m)
        e->path[m++] = '/';
    memcpy(e->path + m, h->name, n);
    e->path[m + n] = 0;
}

static bool plain(const Header *h, Entry *e, const Given *given)
{
    uint64_t mode, uid, gid, size, mtime;
    if (!number(h->mode, sizeof h->mode, &mode) || !number(h->uid, sizeof h->uid, &uid) ||
        !number(h->gid, sizeof h->gid, &gid) || !number(h->size, sizeof h->size, &size) ||
        !number(h->mtime, sizeof h->mtime, &mtime))
        return false;
    e->type = h->type == 0 || h->type == '7' ? '0' : h->type;
    e->mode = (unsigned)mode & 07777;
    e->uid = given->uid ? e->uid : (uint32_t)uid;
    e->gid = given->gid ? e->gid : (uint32_t)gid;
    e->size = given->size ? e->size : size;
    if (!given->mtime)
        e->mtime_s = (int64_t)mtime;
    if (!given->path)
        name_of(h, e);
    if (!given->target)
        text_into(e->target, sizeof e->target, h->target, strnlen(h->target, sizeof h->target));
    if (e->type != '0' || e->same)
        e->size = 0;
    return e->size <= INT64_MAX - TAR_BLOCK || damaged();
}

int tar_read(Tape *t, Entry *e)
{
    static const Header none;
    Given given = {0};
    Header h;
    memset(e, 0, sizeof *e);
    for (;;) {
        if (!copy_out(t, &h, sizeof h))
            return -1;
        if (!memcmp(&h, &none, sizeof h))
            return 0;
        if (!checked(&h))
            return -1;
        if (h.type != 'x' && h.type != 'g')
            return plain(&h, e, &given) ? 1 : -1;
        if (!extended(t, &h, e, &given))
            return -1;
    }
}

bool tar_skip(Tape *t, uint64_t n)
{
    while (n) {
        size_t got;
        if (!tape_read(t, n < TAR_CHUNK ? (size_t)n : TAR_CHUNK, &got))
            return false;
        n -= got;
    }
    return true;
}

/* writing */

bool tar_pad(Tape *t, uint64_t size)
{
    static const uint8_t zero[TAR_BLOCK];
    return tape_write(t, zero, (size_t)(-size & (TAR_BLOCK - 1)));
}

static size_t digits(size_t n)
{
    size_t d = 1;
    for (; n > 9; n /= 10)
        d++;
    return d;
}

static void put_record(Buf *b, const char *key, const char *value)
{
    size_t bare = strlen(key) + strlen(value) + 3, all = bare + digits(bare);
    if (digits(all) > digits(bare))
        all++;
    char *at = (char *)buf_room(b, all + 1);
    b->len += (size_t)snprintf(at, all + 1, "%zu %s=%s\n", all, key, value);
}

static void put_number(Buf *b, const char *key, uint64_t value)
{
    char text[24];
    snprintf(text, sizeof text, "%" PRIu64, value);
    put_record(b, key, text);
}

static void put_time(Buf *b, const Entry *e)
{
    char text[48];
    snprintf(text, sizeof text, "%" PRId64 ".%09" PRId64, e->mtime_s, e->mtime_ns);
    put_record(b, "mtime", text);
}

/* The records say all; what the header says besides is for those who don't read them. */
static bool put_header(Tape *t, char type, const char *path, const char *target, unsigned mode, uint64_t size)
{
    Header h = {.type = type, .magic = "ustar", .version = "00"};
    size_t n = strlen(path), m = strlen(target);
    memcpy(h.name, path, n < sizeof h.name ? n : sizeof h.name);
    memcpy(h.target, target, m < sizeof h.target ? m : sizeof h.target);
    snprintf(h.mode, sizeof h.mode, "%07o", mode & 07777u);
    snprintf(h.uid, sizeof h.uid, "%07o", 0u);
    snprintf(h.gid, sizeof h.gid, "%07o", 0u);
    snprintf(h.size, sizeof h.size, "%011" PRIo64, size & 077777777777u);
    snprintf(h.mtime, sizeof h.mtime, "%011o", 0u);
    snprintf(h.checksum, sizeof h.checksum, "%06o", sum_of(&h));
    return tape_write(t, &h, sizeof h);
}

bool tar_write(Tape *t, const Entry *e)
{
    Buf b = {0};
    put_record(&b, "path", e->path);
    if (*e->target)
        put_record(&b, "linkpath", e->target);
    put_time(&b, e);
    put_number(&b, "uid", e->uid);
    put_number(&b, "gid", e->gid);
    if (e->size)
        put_number(&b, "size", e->size);
    if (e->same)
        put_record(&b, "ISOLAT.same", "1");
    size_t n = buf_size(&b);
    bool fine = put_header(t, 'x', "pax", "", 0600, n) && tape_write(t, b.p + b.at, n) && tar_pad(t, n) &&
                put_header(t, e->type, e->path, e->target, e->mode, e->size);
    buf_free(&b);
    return fine;
}

bool tar_mark(Tape *t, const char *name) { return put_header(t, '0', name, "", 0600, 0); }

bool tar_finish(Tape *t)
{
    static const uint8_t zero[2 * TAR_BLOCK];
    return tape_write(t, zero, sizeof zero) && tape_flush(t);
}
