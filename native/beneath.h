/* openat2(2), which musl's headers lack: a path resolved as those see it whose root is somewhere else. */
#ifndef ISOLAT_BENEATH_H
#define ISOLAT_BENEATH_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { NR_OPENAT2 = 437, RESOLVE_NO_MAGICLINKS = 2, RESOLVE_NO_SYMLINKS = 4, RESOLVE_BENEATH = 8, RESOLVE_IN_ROOT = 16 };
enum { BENEATH_TRIES = 1000 };

static inline int beneath_open(int dir, const char *path, uint64_t flags, uint64_t resolve)
{
    struct {
        uint64_t flags, mode, resolve;
    } how = {.flags = flags | O_CLOEXEC, .resolve = resolve};
    long fd;
    int tries = 0;
    do { /* EAGAIN: something anywhere was renamed while ".." was followed; whoever inside does so all the time ends it */
        fd = syscall(NR_OPENAT2, dir, path, &how, sizeof how);
    } while (fd < 0 && errno == EAGAIN && ++tries < BENEATH_TRIES);
    return (int)fd;
}

#endif
