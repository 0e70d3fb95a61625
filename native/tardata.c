/* What is in a file, into an archive and out of one; with holes as GNU tar writes them ("Storing Sparse Files", PAX
   format 1.0): a map of decimal numbers, one a line, that fills whole blocks, then the data without the holes. */
#include "tar.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 4096, COPY_BYTES = 64 << 10, SPARSE_FROM = 64 << 10, PARTS_MAX = 100000 };

typedef struct {
    uint64_t start, size;
} Part;

static bool damaged(void)
{
    errno = EBADMSG;
    return false;
}

/* writing */

/* Exactly so many bytes, whatever happens to the file meanwhile. */
static bool put_content(Tape *t, int fd, uint64_t at, uint64_t size)
{
    static uint8_t chunk[COPY_BYTES];
    for (uint64_t left = size; left;) {
        size_t most = left < sizeof chunk ? (size_t)left : sizeof chunk;
        ssize_t n = fd < 0 ? 0 : pread(fd, chunk, most, (off_t)at);
        if (n < 0)
            return false;
        if (n == 0) {
            memset(chunk, 0, most);
            n = (ssize_t)most;
        }
        if (!tape_write(t, chunk, (size_t)n))
            return false;
        left -= (uint64_t)n;
        at += (uint64_t)n;
    }
    return true;
}

static bool next_part(int fd, uint64_t at, uint64_t size, Part *p)
{
    off_t start = at < size ? lseek(fd, (off_t)at, SEEK_DATA) : -1;
    off_t end = start < 0 ? -1 : lseek(fd, start, SEEK_HOLE);
    if (end < 0 || (uint64_t)start >= size)
        return false;
    *p = (Part){(uint64_t)start, ((uint64_t)end < size ? (uint64_t)end : size) - (uint64_t)start};
    return p->size != 0;
}

static void put_line(Buf *b, uint64_t number)
{
    char *at = (char *)buf_room(b, 24);
    b->len += (size_t)snprintf(at, 24, "%" PRIu64 "\n", number);
}

/* Where it has data. A last empty part says how far the hole goes, for readers that look at parts only. */
static size_t parts_of(int fd, uint64_t size, Part *parts)
{
    uint64_t at = 0;
    size_t n = 0;
    while (n < PARTS_MAX - 1 && next_part(fd, at, size, &parts[n]))
        at = parts[n].start + parts[n].size, n++;
    if (n == PARTS_MAX - 1) /* of more pieces than a map may have the rest is one */
        parts[n - 1].size = size - parts[n - 1].start;
    else if (at < size)
        parts[n++] = (Part){size, 0};
    return n;
}

static bool put_parts(Tape *t, Entry *e, int fd, uint64_t size, const Part *parts, size_t n)
{
    Buf map = {0};
    put_line(&map, n);
    for (size_t i = 0; i < n; i++) {
        put_line(&map, parts[i].start);
        put_line(&map, parts[i].size);
    }
    size_t bare = buf_size(&map), fill = -bare & (TAR_BLOCK - 1);
    memset(buf_room(&map, fill), 0, fill);
    map.len += fill;
    e->sparse = true;
    e->real = size;
    e->size = buf_size(&map);
    for (size_t i = 0; i < n; i++)
        e->size += parts[i].size;
    bool fine = tar_write(t, e) && tape_write(t, map.p + map.at, buf_size(&map));
    for (size_t i = 0; fine && i < n; i++)
        fine = put_content(t, fd, parts[i].start, parts[i].size);
    buf_free(&map);
    return fine && tar_pad(t, e->size);
}

static bool has_holes(int fd, uint64_t size)
{
    struct stat st;
    return size >= SPARSE_FROM && !fstat(fd, &st) && (uint64_t)st.st_blocks * 512 < size;
}

bool tar_put(Tape *t, Entry *e, int fd, uint64_t size, bool holes)
{
    static Part *parts;
    if (holes && has_holes(fd, size)) {
        parts = parts ? parts : xalloc(PARTS_MAX * sizeof *parts);
        return put_parts(t, e, fd, size, parts, parts_of(fd, size, parts));
    }
    e->size = size;
    return tar_write(t, e) && put_content(t, fd, 0, size) && tar_pad(t, size);
}

/* reading */

static bool all_zero(const uint8_t *p, size_t n) { return !*p && (n == 1 || !memcmp(p, p + 1, n - 1)); }

static size_t in_block(uint64_t offset, size_t n)
{
    size_t left = BLOCK - (size_t)(offset & (BLOCK - 1));
    return left < n ? left : n;
}

static bool write_at(int fd, const uint8_t *p, size_t n, uint64_t offset)
{
    while (n) {
        ssize_t done = pwrite(fd, p, n, (off_t)offset);
        if (done <= 0)
            return false;
        p += done;
        n -= (size_t)done;
        offset += (uint64_t)done;
    }
    return true;
}

/* Holes where there is nothing but zeros. */
static bool put_data(int fd, const uint8_t *p, size_t n, uint64_t *offset)
{
    while (n) {
        size_t some = in_block(*offset, n);
        if (!all_zero(p, some)) {
            for (size_t more; some < n; some += more)
                if (all_zero(p + some, more = in_block(*offset + some, n - some)))
                    break;
            if (!write_at(fd, p, some, *offset))
                return false;
        }
        p += some;
        n -= some;
        *offset += some;
    }
    return true;
}

static bool get_content(Tape *t, int fd, uint64_t at, uint64_t size)
{
    for (uint64_t end = at + size; at < end;) {
        size_t n;
        const uint8_t *p = tape_read(t, end - at < TAR_CHUNK ? (size_t)(end - at) : TAR_CHUNK, &n);
        if (!p || !put_data(fd, p, n, &at))
            return false;
    }
    return true;
}

/* One line of the map. `left`: what of the entry's data is to come. */
static bool get_number(Tape *t, uint64_t *left, uint64_t *number)
{
    *number = 0;
    for (int digits = 0; *left; digits++) {
        size_t n;
        const uint8_t *p = tape_read(t, 1, &n);
        if (!p)
            return false;
        --*left;
        if (*p == '\n' && digits)
            return true;
        if (*p < '0' || *p > '9' || digits > 18)
            return damaged();
        *number = *number * 10 + (uint64_t)(*p - '0');
    }
    return damaged();
}

/* In order, apart from each other, within the file, and together what is left of the data after the map. */
static bool get_map(Tape *t, const Entry *e, Part *parts, size_t count, uint64_t left)
{
    uint64_t end = 0, sum = 0;
    for (size_t i = 0; i < count; i++) {
        if (!get_number(t, &left, &parts[i].start) || !get_number(t, &left, &parts[i].size))
            return false;
        if (parts[i].start < end || parts[i].start > e->real || parts[i].size > e->real - parts[i].start)
            return damaged();
        end = parts[i].start + parts[i].size;
        sum += parts[i].size;
    }
    uint64_t fill = -(e->size - left) & (TAR_BLOCK - 1);
    return (fill <= left && sum == left - fill && tar_skip(t, fill)) || damaged();
}

static bool get_parts(Tape *t, const Entry *e, int fd)
{
    uint64_t left = e->size, count;
    if (!get_number(t, &left, &count))
        return false;
    if (count > PARTS_MAX)
        return damaged();
    Part *parts = xalloc((size_t)(count + 1) * sizeof *parts);
    bool fine = get_map(t, e, parts, (size_t)count, left);
    for (size_t i = 0; fine && i < count; i++)
        fine = get_content(t, fd, parts[i].start, parts[i].size);
    free(parts);
    return fine;
}

bool tar_get(Tape *t, const Entry *e, int fd)
{
    uint64_t size = e->sparse ? e->real : e->size;
    return (e->sparse ? get_parts(t, e, fd) : get_content(t, fd, 0, e->size)) && !ftruncate(fd, (off_t)size) &&
           tar_skip(t, -e->size & (TAR_BLOCK - 1));
}
