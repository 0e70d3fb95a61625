/* Start one process: everything between fork and exec, and how a failure of it comes back. */
#ifndef ISOLAT_SPAWN_H
#define ISOLAT_SPAWN_H

#include "base.h"

enum { HELD_FIRST = 4, CHILD_FDS = 16 };

typedef struct {
    char **argv, **env, **cgroups;
    const char *cwd, *user, *root;
    bool tty, orphan_dies; /* fds[0] is its controlling terminal; SIGKILL when we die */
    bool lowest_priority;  /* it runs when nobody else wants to */
    int spaces;            /* CLONE_NEW* of the namespaces that it starts in */
    bool own_users;        /* it is root of the user namespace `users`, and USER is none of it */
    bool many_descriptors; /* it may have as many as we may allow */
    bool confined;         /* behind a system call filter (filter.c) */
    int64_t file_bytes;    /* no file that it writes becomes larger; 0: no limit */
    int users;
    int fds[CHILD_FDS];    /* stdin, stdout, stderr, the control channel, what is held; -1: /dev/null, or none */
} Command;

/* What a child that could not be started writes into its CLOEXEC pipe. Smaller than PIPE_BUF: all or nothing. */
typedef struct {
    int32_t error, code;
    char stage[16];
    char message[400];
} Failure;

void failure_set(Failure *f, const char *stage, int error, int code, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

pid_t spawn(const Command *c, int *result); /* result: a descriptor with a Failure, or end of file after exec */
void exec_command(char **argv, char **env, Failure *f); /* returns only when it failed */
void child_reset(void); /* signals as a program expects them */
extern bool spawn_resets_oom;
extern bool spawn_hides_keys; /* children have a session keyring of their own, with nothing in it */
bool filter_install(void); /* for good; what has no_new_privs may */

#endif
