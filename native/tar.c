#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SPECIAL_MAX = 1 << 20, EXTRA_MAX = SPECIAL_MAX - (64 << 10) }; /* of one extended header; names come besides */
#define OCTAL_MAX 077777777777u /* what a header has room for */
#define NOBODY UINT32_MAX /* chown(2) would leave the owner as it is, which is root */

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

bool tape_flow(Tape *t, int fd)
{
    memset(t, 0, sizeof *t);
    t->fd = fd;
    t->flows = true;
    t->limit = UINT64_MAX;
    return (t->buf = malloc(TAR_CHUNK)) != NULL;
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
        n = t->flows ? read(t->fd, t->buf, TAR_CHUNK) : pread(t->fd, t->buf, TAR_CHUNK, (off_t)t->offset);
    } while ((n < 0 && errno == EINTR) || again(t, n));
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

bool tape_drain(Tape *t)
{
    ssize_t n;
    do {
        n = read(t->fd, t->buf, TAR_CHUNK);
    } while (n > 0 || (n < 0 && errno == EINTR));
    return n == 0;
}

bool tape_flush(Tape *t)
{
    if (t->flows) {
        size_t n = t->at;
        t->at = 0;
        t->offset += n;
        return write_all(t->fd, t->buf, n);
    }
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
        return n <= 8 || *value >> 63 == 0 || (uint8_t)text[0] == 0xff || damaged(); /* with all bits: below zero */
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
    if (*copy == '-' && ns) {
        e->mtime_s--;
        ns = 1000000000 - ns;
    }
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
    bool path, target, size, mtime, uid, gid, whole;
} Given;

static bool id_of(const char *text, size_t n, uint32_t *id)
{
    uint64_t value;
    if (!decimal(text, n, &value) || value >= NOBODY)
        return damaged();
    *id = (uint32_t)value;
    return true;
}

enum { R_PATH, R_TARGET, R_SIZE, R_MTIME, R_UID, R_GID, R_SAME, R_MAJOR, R_REAL, R_WHOLE, R_MAP, R_OFFSET };

static int known_record(Span key)
{
    static const char *const known[] = {"path", "linkpath", "size", "mtime", "uid", "gid", "ISOLAT.same",
                                        "GNU.sparse.major", "GNU.sparse.realsize", "GNU.sparse.name",
                                        "GNU.sparse.map", "GNU.sparse.offset"};
    for (size_t i = 0; i < LEN(known); i++)
        if (strlen(known[i]) == key.n && !memcmp(known[i], key.p, key.n))
            return (int)i;
    return -1;
}

static bool record(Span key, Span value, Entry *e, Given *given)
{
    const char *text = (const char *)value.p;
    switch (known_record(key)) {
    case R_PATH: return given->whole || (given->path = text_into(e->path, sizeof e->path, text, value.n));
    case R_TARGET: return given->target = text_into(e->target, sizeof e->target, text, value.n);
    case R_SIZE: return given->size = decimal(text, value.n, &e->size);
    case R_MTIME: return given->mtime = time_of(text, value.n, e);
    case R_UID: return given->uid = id_of(text, value.n, &e->uid);
    case R_GID: return given->gid = id_of(text, value.n, &e->gid);
    case R_SAME: return e->same = true;
    case R_MAJOR: return (e->sparse = value.n == 1 && *text == '1') || damaged();
    case R_REAL: return decimal(text, value.n, &e->real);
    case R_WHOLE: return given->path = given->whole = text_into(e->path, sizeof e->path, text, value.n);
    case R_MAP:
    case R_OFFSET: return damaged(); /* older forms of the same */
    default: return true;
    }
}

/* "LENGTH KEY=VALUE\n", LENGTH counting all of itself. */
bool tar_next_record(Span *rest, Span *key, Span *value)
{
    const uint8_t *at = rest->p, *space = memchr(at, ' ', rest->n);
    char digits[12], *end;
    if (!space || space == at || !text_into(digits, sizeof digits, (const char *)at, (size_t)(space - at)))
        return damaged();
    size_t length = strtoul(digits, &end, 10);
    if (*end || length > rest->n || at + length < space + 3 || at[length - 1] != '\n')
        return damaged();
    const uint8_t *equals = memchr(space + 1, '=', (size_t)(at + length - space - 1));
    if (!equals)
        return damaged();
    *key = (Span){space + 1, (size_t)(equals - space - 1)};
    *value = (Span){equals + 1, (size_t)(at + length - 2 - equals)};
    *rest = (Span){at + length, rest->n - length};
    return true;
}

static bool records(Span rest, Entry *e, Given *given)
{
    Span key, value;
    while (rest.n)
        if (!tar_next_record(&rest, &key, &value) || !record(key, value, e, given))
            return false;
    return true;
}

static bool of_next(char type) { return type == 'x' || type == 'g' || type == 'L' || type == 'K'; }

/* What belongs to the entry that follows: records, or a long name as GNU's tar writes it. */
static bool special(Tape *t, const Header *h, Entry *e, Given *given)
{
    static struct {
        char *text;
        size_t room;
    } kept[2]; /* the entry's records stay until the next one, whatever comes after them */
    bool x = h->type == 'x';
    uint64_t size;
    if (!number(h->size, sizeof h->size, &size) || size > SPECIAL_MAX)
        return damaged();
    if (size >= kept[x].room) {
        free(kept[x].text);
        kept[x].text = xalloc(kept[x].room = (size_t)size + 1);
    }
    char *text = kept[x].text;
    if (!copy_out(t, text, (size_t)size) || !tar_skip(t, -size & (TAR_BLOCK - 1)))
        return false;
    switch (h->type) {
    case 'x': return records(e->extra = (Span){(uint8_t *)text, (size_t)size}, e, given);
    case 'L': return given->path = text_into(e->path, sizeof e->path, text, strnlen(text, (size_t)size));
    case 'K': return given->target = text_into(e->target, sizeof e->target, text, strnlen(text, (size_t)size));
    default: return true;
    }
}

static void name_of(const Header *h, Entry *e)
{
    bool ustar = !memcmp(h->magic, "ustar", sizeof h->magic); /* GNU's own form has other things there */
    size_t n = strnlen(h->name, sizeof h->name), m = ustar ? strnlen(h->prefix, sizeof h->prefix) : 0;
    memcpy(e->path, h->prefix, m);
    if (m)
        e->path[m++] = '/';
    memcpy(e->path + m, h->name, n);
    e->path[m + n] = 0;
}

static bool plain(const Header *h, Entry *e, const Given *given)
{
    uint64_t mode, uid, gid, size, mtime, device[2] = {0};
    bool is_device = h->type == '3' || h->type == '4';
    if (!number(h->mode, sizeof h->mode, &mode) || !number(h->uid, sizeof h->uid, &uid) ||
        !number(h->gid, sizeof h->gid, &gid) || !number(h->size, sizeof h->size, &size) ||
        !number(h->mtime, sizeof h->mtime, &mtime))
        return false;
    if ((!given->uid && uid >= NOBODY) || (!given->gid && gid >= NOBODY))
        return damaged();
    if (is_device && (!number(h->major, sizeof h->major, &device[0]) || !number(h->minor, sizeof h->minor, &device[1])))
        return false;
    e->major = (unsigned)device[0];
    e->minor = (unsigned)device[1];
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
    e->sparse = e->sparse && e->type == '0';
    return (e->size <= INT64_MAX - TAR_BLOCK && e->real <= INT64_MAX - TAR_BLOCK) || damaged();
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
        if (!of_next(h.type))
            return plain(&h, e, &given) ? 1 : -1;
        if (!special(t, &h, e, &given))
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

void tar_record(Buf *b, const char *key, const void *value, size_t n)
{
    size_t bare = strlen(key) + n + 3, all = bare + digits(bare);
    if (digits(all) > digits(bare))
        all++;
    char *at = (char *)buf_room(b, all + 1);
    size_t m = (size_t)snprintf(at, all + 1, "%zu %s=", all, key);
    memcpy(at + m, value, n);
    at[all - 1] = '\n';
    b->len += all;
}

bool tar_attribute(Buf *b, const char *name, const void *value, size_t n)
{
    char key[300];
    if (buf_size(b) + n + sizeof key > EXTRA_MAX)
        return false;
    snprintf(key, sizeof key, "SCHILY.xattr.%s", name);
    tar_record(b, key, value, n);
    return true;
}

static void put_text_record(Buf *b, const char *key, const char *text) { tar_record(b, key, text, strlen(text)); }

static void put_number(Buf *b, const char *key, uint64_t value)
{
    char text[24];
    snprintf(text, sizeof text, "%" PRIu64, value);
    put_text_record(b, key, text);
}

/* The nanoseconds count on from the second before, also before 1970; the text is a decimal number. */
static void put_time(Buf *b, const Entry *e)
{
    char text[48];
    int64_t s = e->mtime_s, ns = e->mtime_ns;
    bool before = s < 0 && ns;
    snprintf(text, sizeof text, "%s%" PRId64 ".%09" PRId64, before ? "-" : "", before ? -(s + 1) : s,
             before ? 1000000000 - ns : ns);
    put_text_record(b, "mtime", text);
}

/* The records say all; what the header says besides is for those who don't read them. */
static bool put_header(Tape *t, char type, const char *path, const Entry *e, unsigned mode, uint64_t size)
{
    Header h = {.type = type, .magic = "ustar", .version = "00"};
    const char *target = e ? e->target : "";
    size_t n = strlen(path), m = strlen(target);
    memcpy(h.name, path, n < sizeof h.name ? n : sizeof h.name);
    memcpy(h.target, target, m < sizeof h.target ? m : sizeof h.target);
    snprintf(h.mode, sizeof h.mode, "%07o", mode & 07777u);
    snprintf(h.uid, sizeof h.uid, "%07o", 0u);
    snprintf(h.gid, sizeof h.gid, "%07o", 0u);
    snprintf(h.size, sizeof h.size, "%011" PRIo64, size & OCTAL_MAX);
    snprintf(h.mtime, sizeof h.mtime, "%011o", 0u);
    if (e && (type == '3' || type == '4')) {
        snprintf(h.major, sizeof h.major, "%07o", e->major & 07777777u);
        snprintf(h.minor, sizeof h.minor, "%07o", e->minor & 07777777u);
    }
    snprintf(h.checksum, sizeof h.checksum, "%06o", sum_of(&h));
    return tape_write(t, &h, sizeof h);
}

static void put_sparse(Buf *b, const Entry *e)
{
    put_text_record(b, "GNU.sparse.major", "1");
    put_text_record(b, "GNU.sparse.minor", "0");
    put_text_record(b, "GNU.sparse.name", e->path);
    put_number(b, "GNU.sparse.realsize", e->real);
}

bool tar_write(Tape *t, const Entry *e)
{
    Buf b = {0};
    put_text_record(&b, "path", e->path);
    if (*e->target)
        put_text_record(&b, "linkpath", e->target);
    put_time(&b, e);
    put_number(&b, "uid", e->uid);
    put_number(&b, "gid", e->gid);
    if (e->size > OCTAL_MAX)
        put_number(&b, "size", e->size);
    if (e->same)
        put_text_record(&b, "ISOLAT.same", "1");
    if (e->sparse)
        put_sparse(&b, e);
    if (e->extra.n)
        buf_add(&b, e->extra.p, e->extra.n);
    size_t n = buf_size(&b);
    bool fine = put_header(t, 'x', "pax", NULL, 0600, n) && tape_write(t, b.p + b.at, n) && tar_pad(t, n) &&
                put_header(t, e->type, e->path, e, e->mode, e->size);
    buf_free(&b);
    return fine;
}

bool tar_mark(Tape *t, const char *name) { return put_header(t, '0', name, NULL, 0600, 0); }

bool tar_finish(Tape *t)
{
    static const uint8_t zero[2 * TAR_BLOCK];
    return tape_write(t, zero, sizeof zero) && tape_flush(t);
}
