/* isolat-agent --bind: show a directory or a file at a path as those see it whose root is another. */
#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

/* numbers and structs that musl's headers lack */
#define NR_OPEN_TREE 428
#define NR_MOVE_MOUNT 429
#define NR_OPENAT2 437
#define NR_MOUNT_SETATTR 442
enum { TREE_CLONE = 1, MOVE_FROM_EMPTY = 4, MOVE_TO_EMPTY = 0x40, RESOLVE_NO_MAGICLINKS = 2, RESOLVE_IN_ROOT = 16 };
enum { ATTR_RDONLY = 1, ATTR_NOSUID = 2, ATTR_NODEV = 4 };
struct how {
    uint64_t flags, mode, resolve;
};
struct attributes {
    uint64_t set, clear, propagation, userns;
};

static int open_in(int root, const char *path, uint64_t flags)
{
    struct how how = {.flags = flags | O_PATH | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(NR_OPENAT2, root, path, &how, sizeof how);
}

/* Make what is missing of the path: directories, and at its end a directory or an empty file. */
static bool make_point(int root, const char *target, bool directory)
{
    char so_far[TAR_PATH];
    int parent = fcntl(root, F_DUPFD_CLOEXEC, 3);
    for (const char *at = target + strspn(target, "/"); parent >= 0 && *at;) {
        size_t n = strcspn(at, "/"), end = (size_t)(at - target) + n;
        const char *next = at + n + strspn(at + n, "/");
        if (end >= sizeof so_far || !volume_section(at, n))
            return volume_wrong("mount point", target, EINVAL);
        memcpy(so_far, target, end);
        so_far[end] = 0;
        int fd = open_in(root, so_far, 0);
        if (fd < 0 && errno == ENOENT) {
            const char *name = so_far + (at - target);
            int made = *next || directory ? mkdirat(parent, name, 0755) : mknodat(parent, name, S_IFREG | 0644, 0);
            fd = made ? -1 : open_in(root, so_far, 0);
        }
        close(parent);
        parent = fd;
        at = next;
    }
    if (parent < 0)
        return volume_complain("mount point", target);
    close(parent);
    return true;
}

/* A root that is only read becomes writable for as long as it takes. */
static bool make_point_there(const char *where, int root, const char *target, bool directory)
{
    struct statvfs v;
    bool closed = !statvfs(where, &v) && v.f_flag & ST_RDONLY;
    if (closed && mount(NULL, where, NULL, MS_REMOUNT, NULL))
        return volume_complain("opening", where);
    bool fine = make_point(root, target, directory);
    if (closed && mount(NULL, where, NULL, MS_REMOUNT | MS_RDONLY, NULL))
        return volume_complain("closing", where);
    return fine;
}

int volume_bind(const char *source, const char *where, const char *target, bool read_only)
{
    struct stat st;
    struct attributes a = {.set = ATTR_NOSUID | ATTR_NODEV | (read_only ? ATTR_RDONLY : 0)};
    int root = open(where, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int tree = (int)syscall(NR_OPEN_TREE, AT_FDCWD, source, TREE_CLONE | O_CLOEXEC);
    if (root < 0 || tree < 0 || fstat(tree, &st))
        return volume_complain("opening", source), 1;
    if (syscall(NR_MOUNT_SETATTR, tree, "", AT_EMPTY_PATH, &a, sizeof a))
        return volume_complain("attributes of", source), 1;
    int at = open_in(root, target, 0);
    if (at < 0 && !make_point_there(where, root, target, S_ISDIR(st.st_mode)))
        return 1;
    if (at < 0)
        at = open_in(root, target, 0);
    if (at < 0 || syscall(NR_MOVE_MOUNT, tree, "", at, "", MOVE_FROM_EMPTY | MOVE_TO_EMPTY))
        return volume_complain("mounting at", target), 1;
    return 0;
}
