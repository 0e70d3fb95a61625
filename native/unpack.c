/* Entries of an archive, made below a directory. */
#include "beneath.h"
#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { SECTION_MAX = 255, OWN_NAME = 32 };

/* One part of a path. A process whose root is the environment's follows links as those inside do; else none is. */
static int part(const Tree *t, int fd, const char *name)
{
    return t->inside ? beneath_open(fd, name, O_PATH | O_DIRECTORY, RESOLVE_NO_MAGICLINKS)
                     : openat(fd, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static int down(const Tree *t, int fd, const char *path, size_t n)
{
    for (const char *at = path; fd >= 0 && at < path + n;) {
        char name[SECTION_MAX + 1];
        size_t m = strcspn(at, "/");
        int next = -1, e = EINVAL;
        if (volume_section(at, m)) {
            memcpy(name, at, m);
            name[m] = 0;
            next = part(t, fd, name);
            if (next < 0 && errno == ENOENT && t->inside && !mkdirat(fd, name, 0755))
                next = part(t, fd, name); /* archives need not name the directories that things are in */
            e = errno;
        }
        close(fd);
        fd = next;
        errno = e;
        at += m + 1;
    }
    return fd;
}

/* The directory that the path's last component is in; it stays the tree's. -1 with errno. */
static int parent_of(Tree *t, const char *path, const char **last)
{
    const char *slash = strrchr(path, '/');
    size_t n = slash ? (size_t)(slash - path) : 0;
    *last = slash ? slash + 1 : path;
    if (slash == path || !volume_section(*last, strlen(*last))) {
        errno = EINVAL;
        return -1;
    }
    if (t->parent >= 0 && strlen(t->path) == n && !memcmp(t->path, path, n))
        return t->parent;
    close_fd(&t->parent);
    t->parent = down(t, fcntl(t->root, F_DUPFD_CLOEXEC, 3), path, n);
    memcpy(t->path, path, n);
    t->path[n] = 0;
    return t->parent;
}

typedef struct Late {
    struct Late *next; /* the one before: what is deeper comes first */
    unsigned mode;
    uint32_t uid, gid;
    struct timespec times[2];
    char path[];
} Late;

/* Owners are root's to give; anybody else (tests) keeps what they make. */
static bool owned(int result) { return !result || (errno == EPERM && geteuid()); }

static void times_of(const Entry *e, struct timespec times[2])
{
    struct timespec t = {.tv_sec = (time_t)e->mtime_s, .tv_nsec = (long)e->mtime_ns};
    times[0] = t;
    times[1] = t;
}

static bool attribute_wanted(Span key)
{
    static const char *const wanted[] = {"SCHILY.xattr.user.", "SCHILY.xattr.security.capability"};
    for (size_t i = 0; i < LEN(wanted); i++)
        if (key.n >= strlen(wanted[i]) && !memcmp(key.p, wanted[i], strlen(wanted[i])))
            return true;
    return false;
}

/* After the owner, whose change takes a file's capabilities away. What the file system does not know is left out. */
static bool attributes(int fd, const Entry *e)
{
    Span rest = e->extra, key, value;
    while (rest.n && tar_next_record(&rest, &key, &value)) {
        char name[SECTION_MAX + 1];
        size_t skip = strlen("SCHILY.xattr.");
        if (!attribute_wanted(key) || key.n - skip > SECTION_MAX)
            continue;
        memcpy(name, key.p + skip, key.n - skip);
        name[key.n - skip] = 0;
        if (fsetxattr(fd, name, value.p, value.n, 0) && errno != ENOTSUP && errno != EPERM)
            return false;
    }
    return true;
}

bool unpack_into(Tape *t, const Tree *tree, const Entry *e, int fd)
{
    struct timespec times[2];
    uid_t uid = tree->owners ? e->uid : 0;
    gid_t gid = tree->owners ? e->gid : 0;
    times_of(e, times);
    return tar_get(t, e, fd) && owned(fchown(fd, uid, gid)) && !fchmod(fd, e->mode) &&
           (!tree->owners || attributes(fd, e)) && !futimens(fd, times);
}

/* taking names: what is made has its name once it is whole, and until then what was there before is there */

/* Nobody's, and nobody knows it before it is there. */
static bool own_name(char name[OWN_NAME])
{
    unsigned char bytes[8];
    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes)
        return false;
    size_t n = (size_t)snprintf(name, OWN_NAME, ".isolat-");
    for (size_t i = 0; i < sizeof bytes; i++)
        n += (size_t)snprintf(name + n, OWN_NAME - n, "%02x", bytes[i]);
    return true;
}

/* Where nobody is inside yet, nothing is in the way, and half of it is none: there the name is its own at once. */
static const char *name_for_now(const Tree *t, const char *name, char own[OWN_NAME])
{
    if (!t->inside)
        return name;
    return own_name(own) ? own : NULL;
}

/* What has another name for now takes its own, or goes. A directory stays, rename(2) says so. */
static bool take_name(const Tree *t, int dir, const char *now, const char *name, bool fine)
{
    if (!t->inside)
        return fine;
    fine = fine && !renameat(dir, now, dir, name);
    int error = errno;
    unlinkat(dir, now, 0); /* also where both were names of one file: rename(2) does nothing then */
    errno = error;
    return fine;
}

/* What something is mounted on can't be replaced. */
static int in_place(int dir, const char *name)
{
    struct stat st;
    int fd = openat(dir, name, O_WRONLY | O_NOFOLLOW | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0 || (!fstat(fd, &st) && S_ISREG(st.st_mode) && !ftruncate(fd, 0)))
        return fd;
    close(fd);
    errno = EBUSY;
    return -1;
}

static bool make_named(Tape *t, const Tree *tree, const Entry *e, int dir, const char *name)
{
    char own[OWN_NAME];
    const char *now = name_for_now(tree, name, own);
    int fd = now ? openat(dir, now, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600) : -1;
    if (fd < 0)
        return false;
    bool fine = take_name(tree, dir, now, name, unpack_into(t, tree, e, fd));
    int error = errno;
    close(fd);
    errno = error;
    return fine;
}

/* A name for a file that has none. linkat(2) replaces nothing: only rename(2) does. */
static bool name_file(const Tree *tree, int fd, int dir, const char *name)
{
    char number[16], own[OWN_NAME];
    snprintf(number, sizeof number, "%d", fd);
    if (!linkat(tree->fds, number, dir, name, AT_SYMLINK_FOLLOW))
        return true;
    return errno == EEXIST && own_name(own) && !linkat(tree->fds, number, dir, own, AT_SYMLINK_FOLLOW) &&
           take_name(tree, dir, own, name, true);
}

/* Without a name for now, where the file system has such files: then nothing is left when this is killed. */
static bool make_file(Tape *t, const Tree *tree, const Entry *e, int dir, const char *name)
{
    struct stat st;
    if (tree->inside && !fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) && S_ISDIR(st.st_mode)) {
        errno = EISDIR;
        return false;
    }
    bool mounted = tree->inside && is_mount_root(dir, name);
    int fd = mounted                           ? in_place(dir, name)
             : tree->inside && tree->fds >= 0 ? openat(dir, ".", O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600)
                                               : -1;
    if (fd < 0)
        return !mounted && make_named(t, tree, e, dir, name);
    bool fine = unpack_into(t, tree, e, fd) && (mounted || name_file(tree, fd, dir, name));
    int error = errno;
    close(fd);
    errno = error;
    return fine;
}

static void finish_later(Tree *tree, const Entry *e)
{
    Late *l = xalloc(sizeof *l + strlen(e->path) + 1);
    *l = (Late){.next = tree->late, .mode = e->mode, .uid = tree->owners ? e->uid : 0, .gid = tree->owners ? e->gid : 0};
    times_of(e, l->times);
    strcpy(l->path, e->path);
    tree->late = l;
}

/* At once, since records are only there until the next entry; owner and mode change nothing about them. */
static bool dress_directory(const Tree *tree, const Entry *e, int dir, const char *name)
{
    if (!tree->owners || !e->extra.n)
        return true;
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    bool fine = fd >= 0 && attributes(fd, e);
    int error = errno;
    close_fd(&fd);
    errno = error;
    return fine;
}

/* One that is there is as good. A link to one stays a link, for those who may follow it. */
static bool make_directory(Tree *tree, const Entry *e, int dir, const char *name)
{
    struct stat st;
    if (mkdirat(dir, name, 0700)) {
        if (errno != EEXIST || fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW))
            return false;
        if (!S_ISDIR(st.st_mode)) {
            int fd = S_ISLNK(st.st_mode) ? part(tree, dir, name) : -1;
            errno = ENOTDIR;
            return fd >= 0 && !close(fd);
        }
    }
    finish_later(tree, e);
    return dress_directory(tree, e, dir, name);
}

static bool same_file(int dir, const char *name, int other_dir, const char *other)
{
    struct stat a, b;
    return !fstatat(dir, name, &a, AT_SYMLINK_NOFOLLOW) && !fstatat(other_dir, other, &b, AT_SYMLINK_NOFOLLOW) &&
           a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

/* GNU's tar makes a name that comes twice a further name of itself. */
static bool make_link(Tree *tree, const Entry *e, int dir, const char *name)
{
    char own[OWN_NAME];
    const char *last, *now = name_for_now(tree, name, own);
    int there = fcntl(dir, F_DUPFD_CLOEXEC, 3), from = parent_of(tree, e->target, &last);
    bool fine = now && there >= 0 && from >= 0;
    if (fine && (!tree->inside || !same_file(from, last, there, name)))
        fine = take_name(tree, there, now, name, !linkat(from, last, there, now, 0));
    int error = errno;
    close_fd(&there);
    errno = error;
    return fine;
}

/* Whoever may write to the directory may exchange it meanwhile: what is open is what it was made as. */
static bool dress_fifo(const Tree *tree, const Entry *e, int dir, const char *name)
{
    struct timespec times[2];
    struct stat st;
    int fd = openat(dir, name, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return false;
    times_of(e, times);
    errno = EEXIST;
    bool fine = !fstat(fd, &st) && S_ISFIFO(st.st_mode) &&
                owned(fchown(fd, tree->owners ? e->uid : 0, tree->owners ? e->gid : 0)) && !fchmod(fd, e->mode) &&
                !futimens(fd, times);
    int error = errno;
    close(fd);
    errno = error;
    return fine;
}

static bool dress_symlink(const Tree *tree, const Entry *e, int dir, const char *name)
{
    struct timespec times[2];
    struct stat st;
    int fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return false;
    times_of(e, times);
    errno = EEXIST;
    bool fine = !fstat(fd, &st) && S_ISLNK(st.st_mode) &&
                owned(fchownat(fd, "", tree->owners ? e->uid : 0, tree->owners ? e->gid : 0, AT_EMPTY_PATH)) &&
                !utimensat(dir, name, times, AT_SYMLINK_NOFOLLOW);
    int error = errno;
    close(fd);
    errno = error;
    return fine;
}

/* What is neither file nor directory. */
static bool make_node(const Tree *tree, const Entry *e, int dir, const char *name)
{
    char own[OWN_NAME];
    const char *now = name_for_now(tree, name, own);
    if (!now || (e->type == '2' ? symlinkat(e->target, dir, now) : mkfifoat(dir, now, 0600)))
        return false;
    return take_name(tree, dir, now, name,
                     e->type == '2' ? dress_symlink(tree, e, dir, now) : dress_fifo(tree, e, dir, now));
}

/* "./a" is "a", and so are "/a", where the root is meant anyway, and "a/"; "a//./b" is "a/b". */
static void tidy(const Tree *t, char *path)
{
    size_t n = strlen(path);
    char *to = path;
    while (n > 1 && path[n - 1] == '/')
        path[--n] = 0;
    if (!t->inside)
        return;
    for (const char *at = path; *at;) {
        size_t m = strcspn(at, "/");
        bool counts = m && !(m == 1 && *at == '.');
        if (counts && to > path)
            *to++ = '/';
        memmove(to, at, counts ? m : 0);
        to += counts ? m : 0;
        at += m + (at[m] == '/');
    }
    *to = 0;
}

static bool left_out(const Entry *e, const char *why)
{
    dprintf(2, "left out: \"%.250s\": %s\n", e->path, why);
    return true;
}

bool unpack_one(Tape *t, Tree *tree, Entry *e)
{
    const char *name;
    tidy(tree, e->path);
    if (e->type == '1')
        tidy(tree, e->target);
    if (tree->inside && !*e->path) /* the directory that all is put into stays as it is */
        return tar_skip(t, e->size + (-e->size & (TAR_BLOCK - 1)));
    int dir = parent_of(tree, e->path, &name);
    if (dir < 0)
        return volume_complain("unpacking", e->path);
    bool fine = false;
    switch (e->type) {
    case '0': fine = make_file(t, tree, e, dir, name); break;
    case '1': fine = make_link(tree, e, dir, name); break;
    case '5': fine = make_directory(tree, e, dir, name); break;
    case '2':
    case '6': fine = make_node(tree, e, dir, name); break;
    case '3':
    case '4': return tree->inside ? left_out(e, "it is a device") : volume_wrong("a device", e->path, EINVAL);
    case 'S': return volume_wrong("holes are only read as tar's --format=pax writes them:", e->path, EINVAL);
    default: return volume_wrong("there is no such kind of entry:", e->path, EINVAL);
    }
    return fine || volume_complain("unpacking", e->path);
}

static bool finish_one(Tree *tree, const Late *l)
{
    const char *name;
    int dir = *l->path ? parent_of(tree, l->path, &name) : tree->root;
    int fd = dir < 0 ? -1 : openat(dir, *l->path ? name : ".", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    bool fine = fd >= 0 && owned(fchown(fd, l->uid, l->gid)) && !fchmod(fd, l->mode) && !futimens(fd, l->times);
    int error = errno;
    close_fd(&fd);
    errno = error;
    return fine || volume_complain("finishing", l->path);
}

bool unpack_finish(Tree *tree)
{
    bool fine = true;
    for (Late *l = tree->late; l; l = l->next) /* one that is no more is no reason to leave the others closed */
        fine = finish_one(tree, l) && fine;
    close_fd(&tree->parent);
    return fine;
}
