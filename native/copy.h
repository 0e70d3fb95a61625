/* Files of an environment as an archive, and an archive into one. These are programs that run where the environment's
   own processes do, or where its root has been mounted anew; the archive is on their standard input or output. */
#ifndef ISOLAT_COPY_H
#define ISOLAT_COPY_H

#include "tar.h"

/* what they end with; the last line on stderr says why */
enum { COPY_FAILED = 1, COPY_ABSENT = 3, COPY_REFUSED = 4 };

#define MANY_ATTRIBUTES "some of its attributes, which are more than an archive may have"

typedef struct {
    int root; /* O_PATH; this process's own root as well */
    int fds;  /* /proc/self/fd as it is where this process was started; -1: there is none */
    int disk; /* in: written to the disk at the end, what is in this directory's file system */
    char *root_path, *ids, *disk_path;
    bool follow;   /* out: what a link leads to */
    bool whole;    /* out: nothing that is mounted there */
    bool contents; /* in: of a directory, not itself */
    bool archive;  /* in: one of somebody's own, below a directory that is there */
    bool owners;   /* in: those of the archive, else root's */
} Copy;

int copy_main(int argc, char **argv); /* --copy-out, --copy-in; -1: neither */
bool copy_enter(Copy *c); /* the environment's root, ids and no more */
int copy_fail(int code, const char *path); /* with errno's words */
int copy_refuse(int code, const char *path, const char *why);
int copy_open(const Copy *c, const char *path, uint64_t flags); /* as those inside see it */
int copy_parent(const Copy *c, const char *path, char name[256]); /* the directory that it is in, and what it is called there */
int copy_target(const Copy *c, const char *path, char name[256]); /* the same of what links lead to */
bool copy_wants_directory(const char *path); /* it ends with a slash */

int copy_out(const Copy *c, const char *path, const char *name);
int copy_in(const Copy *c, const char *path, const char *name);

/* layer.c */
int layer_main(int argc, char **argv); /* --layer, --changes; -1: neither */

#endif
