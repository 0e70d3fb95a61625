/* From an environment: what is at a path, as an archive. What changes meanwhile is in it somehow; nothing fails for that. */
#include "copy.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/statfs.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { ATTRIBUTE_NAMES = 64 << 10, ATTRIBUTE_BYTES = 64 << 10 };

static Tape tape;
static const Copy *copy;
static const char *at;  /* the path that was asked for */
static size_t name_len; /* of what stands for it in the archive */
static dev_t device; /* that it begins on */
static bool begun;

static void tell(const char *why)
{
    size_t n = strlen(at), least = !walked[name_len];
    while (n > least && at[n - 1] == '/')
        n--;
    dprintf(2, "left out: \"%.*s%.250s\": %s\n", n < 250 ? (int)n : 250, at, walked + name_len, why);
}

static Walk left_out(const char *why)
{
    if (!walked[name_len]) { /* it is all that was asked for */
        copy_refuse(COPY_FAILED, at, why);
        return WALK_STOP;
    }
    tell(why);
    return WALK_OVER;
}

/* What the kernel only shows, and would show without end. */
static bool shown_by_kernel(int fd)
{
    static const unsigned magic[] = {
        0x9fa0,     /* proc */
        0x62656572, /* sysfs */
        0x1cd1,     /* devpts */
        0x27e0eb,   /* cgroup */
        0x63677270, /* cgroup2 */
        0x19800202, /* mqueue */
        0x64626720, /* debugfs */
        0x74726163, /* tracefs */
        0x73636673, /* securityfs */
        0xcafe4a11, /* bpf */
    };
    struct statfs fs;
    if (fstatfs(fd, &fs))
        return false;
    for (size_t i = 0; i < LEN(magic); i++)
        if ((unsigned)fs.f_type == magic[i])
            return true;
    return false;
}

static bool goes_along(const char *name)
{
    return !strncmp(name, "user.", 5) || !strcmp(name, "security.capability") || !strncmp(name, "system.posix_acl_", 17);
}

static void attributes(int fd, Buf *records)
{
    static char names[ATTRIBUTE_NAMES], value[ATTRIBUTE_BYTES];
    ssize_t n = flistxattr(fd, names, sizeof names), m;
    for (const char *next = names; n > 0 && next < names + n; next += strlen(next) + 1)
        if (goes_along(next) && (m = fgetxattr(fd, next, value, sizeof value)) >= 0 &&
            !tar_attribute(records, next, value, (size_t)m))
            return tell(MANY_ATTRIBUTES);
}

/* What is left out is not remembered: its next name may be one that is not. */
static Walk written(bool fine, const struct stat *st)
{
    if (fine)
        tree_remember(st);
    return fine || volume_complain("writing", walked) ? WALK_INTO : WALK_STOP;
}

/* `e` says what it was when it was looked at; what is opened is what it is now. */
static Walk put_file(int dir, const char *name, Entry *e)
{
    struct stat st;
    Buf records = {0};
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? WALK_OVER : left_out(strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        return left_out("it was replaced meanwhile");
    }
    attributes(fd, &records);
    e->extra = buf_span(&records);
    Walk next = written(tar_put(&tape, e, fd, (uint64_t)st.st_size, true), &st);
    buf_free(&records);
    close(fd);
    return next;
}

/* Whether to go into it. */
static Walk put_directory(int dir, const char *name, Entry *e, const struct stat *st)
{
    Buf records = {0};
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? WALK_OVER : left_out(strerror(errno));
    bool over = (copy->whole && begun && is_mount_root(dir, name)) || (st->st_dev != device && shown_by_kernel(fd));
    begun = true;
    attributes(fd, &records);
    e->extra = buf_span(&records);
    Walk next = written(tar_write(&tape, e), st);
    buf_free(&records);
    close(fd);
    return next == WALK_INTO && over ? WALK_OVER : next;
}

static Walk put_one(int dir, const char *name, const struct stat *st)
{
    static Entry e;
    if (copy->whole && !S_ISDIR(st->st_mode) && is_mount_root(dir, name))
        return WALK_OVER;
    if (!tree_entry(&e, dir, name, st))
        return errno == ENOENT ? WALK_OVER : left_out(strerror(errno));
    switch (e.type) {
    case '0': return put_file(dir, name, &e);
    case '5': return put_directory(dir, name, &e, st);
    case '3':
    case '4': return copy->whole ? written(tar_write(&tape, &e), st) : left_out("it is a device");
    case 0: return left_out("it is a socket");
    default: return written(tar_write(&tape, &e), st);
    }
}

/* The directory that it is in, and its name there; of what a link leads to, or of a directory, itself. */
static int find(const Copy *c, const char *path, char name[256])
{
    bool directory = copy_wants_directory(path) || !*path;
    if (!c->follow && !directory)
        return copy_parent(c, path, name);
    int fd = copy_open(c, path, O_PATH | (directory ? O_DIRECTORY : 0));
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        return -1;
    strcpy(name, ".");
    if (S_ISDIR(st.st_mode))
        return fd;
    close(fd);
    return copy_target(c, path, name);
}

int copy_out(const Copy *c, const char *path, const char *name)
{
    char found[256];
    struct stat st;
    copy = c;
    at = path;
    name_len = strlen(name);
    int dir = find(c, path, found);
    if (dir < 0 || fstatat(dir, found, &st, AT_SYMLINK_NOFOLLOW))
        return copy_fail(errno == ENOENT ? COPY_ABSENT : COPY_REFUSED, path);
    if (!tape_flow(&tape, 1))
        return copy_fail(COPY_FAILED, path);
    device = st.st_dev;
    bool fine = tree_walk(dir, found, name, put_one) && tar_finish(&tape);
    close(dir);
    return fine ? 0 : COPY_FAILED;
}
