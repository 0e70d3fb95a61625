/* Archives as POSIX.1-2017 has them ("pax Interchange Format"): ustar headers, and before each a header of type x with
   what they have no room for. Read from and written to a disk, a file or a descriptor that is either. */
#ifndef ISOLAT_TAR_H
#define ISOLAT_TAR_H

#include "base.h"

#include <sys/stat.h>

enum { TAR_BLOCK = 512, TAR_PATH = 4096, TAR_CHUNK = 256 << 10 };

typedef struct {
    char type; /* '0' a file, '1' another name of one, '2' a symbolic link, '3' '4' devices, '5' a directory, '6' a FIFO */
    char path[TAR_PATH], target[TAR_PATH];
    uint64_t size; /* of what follows */
    uint64_t real; /* of a file with holes, whose map comes before its data ("sparse"): GNU tar's format 1.0 */
    bool sparse;
    int64_t mtime_s, mtime_ns;
    unsigned mode, major, minor;
    uint32_t uid, gid;
    bool same;  /* nothing of it has changed since it came in: no data follows */
    Span extra; /* records of its own, as they are written; of one that was read all of them, until the next one */
} Entry;

typedef struct {
    int fd;
    bool flows;   /* a pipe or socket: no offsets */
    uint8_t *buf; /* TAR_CHUNK bytes, aligned for O_DIRECT */
    size_t at, len;
    uint64_t offset, limit; /* of the disk; how much of it may be written */
} Tape;

bool tape_open(Tape *t, const char *path, bool writes, uint64_t limit);
bool tape_flow(Tape *t, int fd);
bool tape_drain(Tape *t); /* read what follows an archive that flows */
const uint8_t *tape_read(Tape *t, size_t most, size_t *n); /* the next bytes, as they lie there; NULL: no more */
bool tape_write(Tape *t, const void *p, size_t n);
bool tape_flush(Tape *t);

int tar_read(Tape *t, Entry *e);   /* 1: an entry, its data follows; 0: the end; -1: damaged, with errno */
bool tar_skip(Tape *t, uint64_t n); /* over data, and what fills its last block */
bool tar_write(Tape *t, const Entry *e);
bool tar_pad(Tape *t, uint64_t size); /* after this much data */
bool tar_finish(Tape *t);
bool tar_mark(Tape *t, const char *name); /* one block: an empty file of this name */
void tar_record(Buf *b, const char *key, const void *value, size_t n); /* for Entry.extra */
bool tar_attribute(Buf *b, const char *name, const void *value, size_t n); /* the same; false: one entry can't have so many */
bool tar_next_record(Span *rest, Span *key, Span *value);

/* tardata.c */
bool tar_put(Tape *t, Entry *e, int fd, uint64_t size, bool holes); /* a file: entry and so many bytes, whatever happens to it */
bool tar_get(Tape *t, const Entry *e, int fd); /* what follows, into an empty file, holes as holes */

/* tree.c: a walk in the order of names, never through a symbolic link */
typedef enum { WALK_INTO, WALK_OVER, WALK_STOP } Walk;
typedef Walk (*Visit)(int dir, const char *name, const struct stat *st);
extern char walked[TAR_PATH]; /* the path of what is visited */
bool tree_walk(int dir, const char *name, const char *as, Visit visit); /* what goes meanwhile is left out */
char **tree_names(int dir);            /* sorted, to be freed with tree_free; NULL with errno */
void tree_free(char **names);
bool tree_entry(Entry *e, int dir, const char *name, const struct stat *st); /* what stands in an archive, as `walked` */
void tree_remember(const struct stat *st); /* it does stand there: its other names lead to this one */
void many_descriptors(void); /* one is open for each level of a tree */
bool volume_complain(const char *what, const char *path); /* false, with errno's words on stderr */
bool volume_wrong(const char *what, const char *path, int error);
bool volume_section(const char *p, size_t n); /* may this be one part of a path? */

/* unpack.c: below a directory */
typedef struct {
    int root, parent; /* parent: of the latest path, since the next one is mostly beside it */
    char path[TAR_PATH];
    bool inside; /* the root of this process is the environment's: its links are followed, what is there is replaced */
    bool owners; /* those of the archive, else root */
    int fds;     /* inside: /proc/self/fd, or -1; what is open gets its name through it */
    struct Late *late;
} Tree;
bool unpack_one(Tape *t, Tree *tree, Entry *e);
bool unpack_into(Tape *t, const Tree *tree, const Entry *e, int fd); /* content and all else of a file that is open */
bool unpack_finish(Tree *tree); /* owners, modes and times of directories, once nothing is put into them any more */

/* volumes.c */
int volumes_main(int argc, char **argv); /* --unpack, --pack, --bind; -1: none of these */

/* bind.c */
int volume_bind(const char *source, const char *where, const char *target, bool read_only);

#endif
