/* Archives as POSIX.1-2017 has them ("pax Interchange Format"): ustar headers, and before each a header of type x with
   what they have no room for. Read from and written to a disk, a file or a descriptor that is either. */
#ifndef ISOLAT_TAR_H
#define ISOLAT_TAR_H

#include "base.h"

enum { TAR_BLOCK = 512, TAR_PATH = 4096, TAR_CHUNK = 256 << 10 };

typedef struct {
    char type; /* '0' a file, '1' another name of one, '2' a symbolic link, '5' a directory, '6' a FIFO */
    char path[TAR_PATH], target[TAR_PATH];
    uint64_t size;
    int64_t mtime_s, mtime_ns;
    unsigned mode;
    uint32_t uid, gid;
    bool same; /* nothing of it has changed since it came in: no data follows */
} Entry;

typedef struct {
    int fd;
    uint8_t *buf; /* TAR_CHUNK bytes, aligned for O_DIRECT */
    size_t at, len;
    uint64_t offset, limit; /* of the disk; how much of it may be written */
} Tape;

bool tape_open(Tape *t, const char *path, bool writes, uint64_t limit);
const uint8_t *tape_read(Tape *t, size_t most, size_t *n); /* the next bytes, as they lie there; NULL: no more */
bool tape_write(Tape *t, const void *p, size_t n);
bool tape_flush(Tape *t);

int tar_read(Tape *t, Entry *e);   /* 1: an entry, its data follows; 0: the end; -1: damaged, with errno */
bool tar_skip(Tape *t, uint64_t n); /* over data, and what fills its last block */
bool tar_write(Tape *t, const Entry *e);
bool tar_pad(Tape *t, uint64_t size); /* after this much data */
bool tar_finish(Tape *t);
bool tar_mark(Tape *t, const char *name); /* one block: an empty file of this name */

/* volumes.c */
bool volume_complain(const char *what, const char *path); /* false, with errno's words on stderr */
bool volume_wrong(const char *what, const char *path, int error);
bool volume_section(const char *p, size_t n); /* may this be one part of a path? */
int volumes_main(int argc, char **argv); /* --unpack, --pack, --bind; -1: none of these */

/* bind.c */
int volume_bind(const char *source, const char *where, const char *target, bool read_only);

#endif
