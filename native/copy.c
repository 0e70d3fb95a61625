/* --copy-out [OPTION…] PATH NAME    write what is at PATH to standard output, as an archive of NAME
   --copy-in [OPTION…] PATH NAME     read an archive from standard input, to PATH; NAME: what it is called in a directory

   --root DIRECTORY    the environment's root, where it is not the one of this process
   --ids FIRST:COUNT   the ids that those inside have outside: it is done as their root, in a user namespace like theirs
   --disk DIRECTORY    a directory of a file system that has to be on its disk when this has ended: it is killed next
   --follow --whole --contents --archive --owners: copy.h

   Whoever runs inside may exchange files, directories and links at any moment. Nothing here is resolved but below the
   environment's root, and nothing is done but with the rights that root has there. */
#include "copy.h"

#include "beneath.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LINKS_MAX = 40 };

/* linux/capability.h */
enum { CHOWN = 0, DAC_OVERRIDE = 1, FOWNER = 3, FSETID = 4, SETFCAP = 31 };
#define CAPABILITY_VERSION 0x20080522
#define KEPT (1ull << CHOWN | 1ull << DAC_OVERRIDE | 1ull << FOWNER | 1ull << FSETID | 1ull << SETFCAP)

int copy_refuse(int code, const char *path, const char *why)
{
    dprintf(2, "\"%.250s\": %s\n", path, why);
    return code;
}

int copy_fail(int code, const char *path) { return copy_refuse(code, path, strerror(errno)); }

/* Below the root, whatever links there are; those of /proc lead nowhere. */
int copy_open(const Copy *c, const char *path, uint64_t flags)
{
    return beneath_open(c->root, *path ? path : "/", flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
}

bool copy_wants_directory(const char *path) { return *path && path[strlen(path) - 1] == '/'; }

int copy_parent(const Copy *c, const char *path, char name[256])
{
    char parent[TAR_PATH];
    size_t n = strlen(path), at;
    while (n && path[n - 1] == '/')
        n--;
    for (at = n; at && path[at - 1] != '/';)
        at--;
    if (n - at > 255 || n >= sizeof parent || !volume_section(path + at, n - at)) {
        errno = n - at > 255 || n >= sizeof parent ? ENAMETOOLONG : EINVAL;
        return -1;
    }
    memcpy(name, path + at, n - at);
    name[n - at] = 0;
    memcpy(parent, path, at);
    parent[at] = 0;
    return copy_open(c, parent, O_PATH | O_DIRECTORY);
}

/* Link after link, as text that is resolved from the root each time: whoever exchanges one changes where it ends, but
   not that it is below the root. */
int copy_target(const Copy *c, const char *path, char name[256])
{
    static char at[TAR_PATH], link[TAR_PATH];
    if (strlen(path) >= sizeof at)
        return errno = ENAMETOOLONG, -1;
    strcpy(at, path);
    for (int links = 0; links < LINKS_MAX; links++) {
        for (size_t n = strlen(at); n > 1 && at[n - 1] == '/';)
            at[--n] = 0;
        int dir = copy_parent(c, at, name);
        ssize_t n = dir < 0 ? -1 : readlinkat(dir, name, link, sizeof link - 1);
        if (n < 0 && (dir < 0 || errno == EINVAL || errno == ENOENT))
            return dir; /* no link, or nothing */
        int error = errno;
        close(dir);
        size_t last = n > 0 && *link == '/' ? 0 : strlen(at) - strlen(name);
        errno = n < 0 ? error : ENAMETOOLONG;
        if (n < 0 || last + (size_t)n >= sizeof at)
            return -1;
        memcpy(at + last, link, (size_t)n);
        at[last + (size_t)n] = 0;
    }
    errno = ELOOP;
    return -1;
}

/* ids */

static bool write_map(pid_t pid, const char *file, const char *ids)
{
    char path[64], line[64];
    unsigned long first = strtoul(ids, NULL, 10), count = strtoul(strchr(ids, ':') + 1, NULL, 10);
    snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
    snprintf(line, sizeof line, "0 %lu %lu\n", first, count);
    return write_file(path, line);
}

/* A map is written from outside of the namespace: by a child, which has stayed there. */
static bool own_ids(const char *ids)
{
    int ready[2], status;
    char byte = 0;
    pid_t parent = getpid();
    if (!strchr(ids, ':') || pipe2(ready, O_CLOEXEC))
        return false;
    pid_t child = fork();
    if (!child) {
        close(ready[1]);
        bool fine = read(ready[0], &byte, 1) == 1 && write_map(parent, "uid_map", ids) && write_map(parent, "gid_map", ids);
        _exit(fine ? 0 : 1);
    }
    close(ready[0]);
    bool fine = child > 0 && !unshare(CLONE_NEWUSER) && write(ready[1], &byte, 1) == 1;
    close(ready[1]);
    if (child > 0 && (waitpid(child, &status, 0) != child || status))
        fine = false;
    return fine && !setresgid(0, 0, 0) && !setresuid(0, 0, 0);
}

typedef struct {
    uint32_t effective, permitted, inheritable;
} Capabilities;

/* What root has by default in a container, as far as files go; and no more than it has here. */
static bool few_capabilities(void)
{
    struct {
        uint32_t version;
        int pid;
    } header = {CAPABILITY_VERSION, 0};
    Capabilities sets[2];
    if (syscall(SYS_capget, &header, sets))
        return false;
    for (int i = 0; i < 2; i++) {
        uint32_t kept = sets[i].permitted & (uint32_t)(KEPT >> 32 * i);
        sets[i] = (Capabilities){kept, kept, 0};
    }
    return !syscall(SYS_capset, &header, sets);
}

bool copy_enter(Copy *c)
{
    c->root = open(c->root_path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    c->fds = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
    c->disk = c->disk_path ? open(c->disk_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (c->root < 0 || (c->disk_path && c->disk < 0))
        return false;
    if (strcmp(c->root_path, "/") != 0 || c->ids) {
        if ((c->ids && !own_ids(c->ids)) || fchdir(c->root) || chroot(".") || chdir("/") || !few_capabilities())
            return false;
    }
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    umask(0);
    many_descriptors();
    return true;
}

static bool option(Copy *c, const char *word, char ***next)
{
    const struct {
        const char *word;
        bool *flag;
    } flags[] = {{"--follow", &c->follow}, {"--whole", &c->whole}, {"--contents", &c->contents},
                 {"--archive", &c->archive}, {"--owners", &c->owners}};
    const struct {
        const char *word;
        char **value;
    } values[] = {{"--root", &c->root_path}, {"--ids", &c->ids}, {"--disk", &c->disk_path}};
    for (size_t i = 0; i < LEN(values); i++)
        if (!strcmp(word, values[i].word))
            return (*values[i].value = **next) && ++*next;
    for (size_t i = 0; i < LEN(flags); i++)
        if (!strcmp(word, flags[i].word))
            return *flags[i].flag = true;
    return false;
}

int copy_main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    bool out = !strcmp(how, "--copy-out");
    Copy c = {.root_path = "/"};
    char **next = argv + 2;
    if (!out && strcmp(how, "--copy-in") != 0)
        return -1;
    while (*next && !strncmp(*next, "--", 2))
        if (next++, !option(&c, next[-1], &next))
            return copy_refuse(COPY_FAILED, next[-1], "there is no such option");
    if (!next[0] || !next[1] || next[2])
        return copy_refuse(COPY_FAILED, how, "it wants a path and a name");
    if (!copy_enter(&c))
        return copy_fail(COPY_FAILED, c.root_path);
    int code = out ? copy_out(&c, next[0], next[1]) : copy_in(&c, next[0], next[1]);
    return code || c.disk < 0 || !syncfs(c.disk) ? code : copy_fail(COPY_FAILED, c.disk_path);
}
