/* The steps of a plan, carried out or reverted, synchronously: an environment does one operation at a time.
   All idempotent: what is there already is fine when carried out, what is absent is fine when reverted. */
#include "node.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* numbers that musl's headers lack; the system calls have the same on every architecture */
#define NR_OPEN_TREE 428
#define NR_MOVE_MOUNT 429
#define NR_MOUNT_SETATTR 442
#define TREE_CLONE 1
#define MOVE_FROM_EMPTY 4
#define ATTR_IDMAP 0x100000
struct attributes {
    uint64_t set, clear, propagation, userns;
};

#define BTRFS 0x94
struct btrfs_volume {
    int64_t fd;
    char name[4088];
};
struct btrfs_lookup {
    uint64_t tree, object;
    char name[4080];
};
struct btrfs_limit {
    uint64_t qgroup, flags, max_rfer, max_excl, rsv_rfer, rsv_excl;
};
#define BTRFS_CREATE _IOW(BTRFS, 14, struct btrfs_volume)
#define BTRFS_DESTROY _IOW(BTRFS, 15, struct btrfs_volume)
#define BTRFS_LOOKUP _IOWR(BTRFS, 18, struct btrfs_lookup)
#define BTRFS_LIMIT _IOR(BTRFS, 43, struct btrfs_limit)
#define BTRFS_ROOT_INODE 256
#define BTRFS_MAX_RFER 1

enum { RUN_MS = 30000, CGROUP_MS = 5000, CGROUP_DEPTH = 8 };

typedef struct {
    Span body;
    const char *name;
    int *fds, nfds; /* what came along, not yet taken */
    Failure *failure;
    Buf *tail;
} Step;

typedef struct {
    const char *name;
    bool (*carry_out)(Step *);
    bool (*revert)(Step *);
} Kind;

static bool failed(Step *s, const char *what, const char *path)
{
    int e = errno;
    failure_set(s->failure, s->name, e, 0, "%s \"%.250s\": %s", what, path, strerror(e));
    return false;
}

static bool refused(Step *s, const char *why, const char *path)
{
    failure_set(s->failure, s->name, EINVAL, 0, "%s: \"%.250s\"", why, path);
    return false;
}

/* What a revert may remove: an absolute path with two components at least, and without "..". */
static bool removable(const char *path)
{
    const char *second = path[0] == '/' ? strchr(path + 1, '/') : NULL;
    size_t n = strlen(path);
    bool upwards = strstr(path, "/../") || (n >= 3 && !strcmp(path + n - 3, "/.."));
    return second && second[1] && path[n - 1] != '/' && !upwards;
}

static bool own(const Step *s, const char *path)
{
    int64_t mode = field_int(s->body, T_MODE, -1);
    int64_t uid = field_int(s->body, T_UID, -1), gid = field_int(s->body, T_GID, -1);
    if ((uid >= 0 || gid >= 0) && chown(path, (uid_t)uid, (gid_t)gid))
        return false;
    return mode < 0 || !chmod(path, (mode_t)mode & 07777); /* after chown, which clears setuid */
}

static bool dir_do(Step *s)
{
    const char *path = field_text(s->body, T_PATH);
    if (field_int(s->body, T_MODE, 0) < 0)
        return true; /* a leftover: there is only something to undo */
    return (!mkdir_p(path, 0755) && own(s, path)) || failed(s, "directory", path);
}

static bool dir_undo(Step *s)
{
    const char *path = field_text(s->body, T_PATH);
    if (!removable(path))
        return refused(s, "this is not removed", path);
    return remove_tree(path) || errno == ENOENT || errno == ENOTDIR || failed(s, "removing", path);
}

/* Below an overlay that is mounted a file may change, but not become another one. */
static bool file_in_place(Step *s, const char *path, Span data)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
    bool fine = fd >= 0 && write_all(fd, data.p, data.n);
    int e = errno;
    close_fd(&fd);
    errno = e;
    return fine || failed(s, "file", path);
}

static bool file_do(Step *s)
{
    char beside[4096];
    Span data = {0};
    const char *path = field_text(s->body, T_PATH);
    if (snprintf(beside, sizeof beside, "%s.%d.tmp", path, getpid()) >= (int)sizeof beside)
        return refused(s, "the path is too long", path);
    field_find(s->body, T_DATA, &data);
    if (field_int(s->body, T_COUNT, 0))
        return file_in_place(s, path, data);
    unlink(beside);
    int fd = open(beside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
    bool fine = fd >= 0 && write_all(fd, data.p, data.n) && own(s, beside) && !rename(beside, path);
    int e = errno;
    close_fd(&fd);
    if (!fine)
        unlink(beside);
    errno = e;
    return fine || failed(s, "file", path);
}

static bool file_undo(Step *s)
{
    const char *path = field_text(s->body, T_PATH);
    return !unlink(path) || errno == ENOENT || errno == ENOTDIR || failed(s, "removing", path);
}

/* Where something is to be mounted there must be something: a directory, or a file where the source is none. */
static bool make_target(const char *target, bool directory)
{
    struct stat st;
    if (!stat(target, &st))
        return true;
    if (directory)
        return !mkdir_p(target, 0755);
    char *parent = strdup(target), *slash = strrchr(parent, '/');
    if (slash && slash != parent) {
        *slash = 0;
        mkdir_p(parent, 0755);
    }
    free(parent);
    int fd = open(target, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0)
        return false;
    close(fd);
    return true;
}

static bool mount_do(Step *s)
{
    struct stat st;
    unsigned long flags = (unsigned long)field_int(s->body, T_COUNT, 0);
    const char *source = field_text(s->body, T_SOURCE), *target = field_text(s->body, T_TARGET);
    const char *type = field_text(s->body, T_FSTYPE), *data = field_text(s->body, T_OPTIONS);
    bool changes = flags & (MS_REMOUNT | MS_SHARED | MS_PRIVATE | MS_SLAVE | MS_UNBINDABLE);
    bool file = flags & MS_BIND && !stat(source, &st) && !S_ISDIR(st.st_mode);
    if (!changes && is_mount_root(AT_FDCWD, target))
        return true;
    if (!changes && !make_target(target, !file))
        return failed(s, "mount point", target);
    return !mount(source, target, *type ? type : NULL, flags, *data ? data : NULL) || failed(s, "mounting on", target);
}

static bool mount_undo(Step *s)
{
    const char *target = field_text(s->body, T_TARGET);
    if (!umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW) || errno == EINVAL || errno == ENOENT || errno == ENOTDIR)
        return true;
    return failed(s, "unmounting", target);
}

/* The lines of a uid_map or gid_map. */
static bool map_text(Step *s, char *text, size_t size)
{
    Span rest = s->body, line;
    size_t at = 0;
    while (field_each(&rest, T_LINE, &line)) {
        Span ids = line, from = {0}, to = {0};
        if (!field_each(&ids, T_UID, &from) || !field_each(&ids, T_UID, &to) || at > size - 48)
            return false;
        at += (size_t)snprintf(text + at, size - at, "%u %u %u\n", (unsigned)span_int(from), (unsigned)span_int(to),
                               (unsigned)field_int(line, T_COUNT, 1));
    }
    return at > 0;
}

/* A user namespace exists as long as somebody is in it: a child that waits to be killed. */
int userns_with(const char *map)
{
    char path[64];
    pid_t pid = (pid_t)syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) {
        /* It shares the keeper's lock, like every fork: it must not outlive a keeper that is killed just now. */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    if (pid < 0)
        return -1;
    int fd = -1;
    snprintf(path, sizeof path, "/proc/%d/uid_map", pid);
    bool fine = write_file(path, map);
    snprintf(path, sizeof path, "/proc/%d/gid_map", pid);
    fine = fine && write_file(path, map);
    snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
    if (fine)
        fd = open(path, O_RDONLY | O_CLOEXEC);
    int e = errno;
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    errno = e;
    return fd;
}

static int open_tree_at(int fd, const char *path)
{
    return (int)syscall(NR_OPEN_TREE, fd, path, TREE_CLONE | O_CLOEXEC | (*path ? 0 : AT_EMPTY_PATH));
}

/* Only a mount of the namespace that one is in can be cloned, and the caller opened it in ours of old. */
static int clone_at_home(int given)
{
    int here = node.home_mounts < 0 ? -1 : open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    if (here < 0 || setns(node.home_mounts, CLONE_NEWNS)) {
        close_fd(&here);
        errno = EINVAL;
        return -1;
    }
    int tree = open_tree_at(given, "");
    int e = errno;
    if (setns(here, CLONE_NEWNS) || chdir("/"))
        die("returning to our mount namespace");
    close(here);
    errno = e;
    return tree;
}

static int clone_mount(Step *s, const char *source)
{
    if (!s->nfds)
        return open_tree_at(AT_FDCWD, source);
    int given = *s->fds;
    *s->fds++ = -1;
    s->nfds--;
    int tree = open_tree_at(given, "");
    if (tree < 0 && errno == EINVAL)
        tree = clone_at_home(given);
    int e = errno;
    close(given);
    errno = e;
    return tree;
}

static bool attach_idmapped(Step *s, int tree, int userns, const char *target)
{
    struct stat st;
    struct attributes a = {.set = ATTR_IDMAP | (uint64_t)field_int(s->body, T_COUNT, 0), .userns = (uint64_t)userns};
    if (syscall(NR_MOUNT_SETATTR, tree, "", AT_EMPTY_PATH, &a, sizeof a))
        return failed(s, "idmapping for", target);
    if (fstat(tree, &st) || !make_target(target, S_ISDIR(st.st_mode)))
        return failed(s, "mount point", target);
    return !syscall(NR_MOVE_MOUNT, tree, "", AT_FDCWD, target, MOVE_FROM_EMPTY) || failed(s, "attaching at", target);
}

static bool idmap_do(Step *s)
{
    char map[4096];
    const char *source = field_text(s->body, T_SOURCE), *target = field_text(s->body, T_TARGET);
    if (is_mount_root(AT_FDCWD, target))
        return true;
    if (!map_text(s, map, sizeof map))
        return refused(s, "LINE is missing or wrong", target);
    int tree = clone_mount(s, source);
    if (tree < 0)
        return failed(s, "cloning the mount at", source);
    int userns = userns_with(map);
    bool fine = userns >= 0 ? attach_idmapped(s, tree, userns, target) : failed(s, "user namespace for", target);
    close_fd(&tree);
    close_fd(&userns);
    return fine;
}

/* Whatever a faulty plan says: cgroups that are not ours are never touched. */
static bool our_cgroup(const char *path) { return removable(path) && strstr(path, "/isolat"); }

static bool cgroup_do(Step *s)
{
    Span rest = s->body, write;
    char **paths = field_list(s->body, T_PATH);
    for (; *paths; paths++) {
        if (!our_cgroup(*paths))
            return refused(s, "this is none of our cgroups", *paths);
        if (mkdir_p(*paths, 0755))
            return failed(s, "cgroup", *paths);
    }
    while (field_each(&rest, T_WRITE, &write)) {
        Span data = {0};
        const char *path = field_text(write, T_PATH);
        if (!our_cgroup(path))
            return refused(s, "this is none of our cgroups", path);
        field_find(write, T_DATA, &data);
        if (!write_file(path, request_text(data)))
            return failed(s, "writing", path);
    }
    return true;
}

static bool write_in(int dir, const char *name, const char *text)
{
    int fd = openat(dir, name, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    bool fine = write_all(fd, text, strlen(text));
    close(fd);
    return fine;
}

static void kill_members(int dir)
{
    char text[4096], *at = text, *end;
    if (write_in(dir, "cgroup.kill", "1"))
        return;
    write_in(dir, "freezer.state", "THAWED"); /* a frozen process does not even die */
    int fd = openat(dir, "cgroup.procs", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    text[n > 0 ? n : 0] = 0;
    close_fd(&fd);
    for (long pid; (pid = strtol(at, &end, 10)), end != at && (*end == '\n' || n < (ssize_t)sizeof text - 1); at = end)
        if (pid > 1 && pid != getpid())
            kill((pid_t)pid, SIGKILL);
}

/* Children first. False: something lives there still. */
static bool remove_cgroup(int parent, const char *name, int depth)
{
    struct dirent *e;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT;
    kill_members(fd);
    DIR *d = depth < CGROUP_DEPTH ? fdopendir(fcntl(fd, F_DUPFD_CLOEXEC, 10)) : NULL;
    while (d && (e = readdir(d)))
        if (e->d_type == DT_DIR && strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            remove_cgroup(fd, e->d_name, depth + 1);
    if (d)
        closedir(d);
    close(fd);
    return !unlinkat(parent, name, AT_REMOVEDIR) || errno == ENOENT;
}

/* What one hierarchy has frozen is waited for in all of them. */
static void thaw(char **paths)
{
    for (; *paths; paths++) {
        int dir = our_cgroup(*paths) ? open(*paths, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
        if (dir >= 0)
            write_in(dir, "freezer.state", "THAWED");
        close_fd(&dir);
    }
}

static bool cgroup_undo(Step *s)
{
    int64_t end = ticks_ms() + CGROUP_MS;
    char **paths = field_list(s->body, T_PATH);
    size_t n = 0;
    while (paths[n])
        n++;
    thaw(paths);
    while (n--) { /* backwards: a directory may be listed after its parent */
        if (!our_cgroup(paths[n]))
            return refused(s, "this is none of our cgroups", paths[n]);
        for (int pause_ms = 1; !remove_cgroup(AT_FDCWD, paths[n], 0); pause_ms = pause_ms < 16 ? pause_ms * 2 : 16) {
            if (ticks_ms() >= end) {
                errno = EBUSY;
                return failed(s, "removing", paths[n]);
            }
            sleep_ms(pause_ms);
        }
    }
    return true;
}

static void run_child(char **argv, char **env, int err)
{
    static char *plain[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    Failure f;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    setsid();
    child_reset();
    dup2(null, 0);
    dup2(null, 1);
    dup2(err, 2);
    exec_command(argv, *env ? env : plain, &f);
    dprintf(2, "%s", f.message);
    _exit(f.code);
}

static void tail_read(Buf *tail, int fd)
{
    uint8_t chunk[1024];
    ssize_t n;
    while ((n = read(fd, chunk, sizeof chunk)) > 0) {
        buf_add(tail, chunk, (size_t)n);
        if (buf_size(tail) > TAIL_BYTES)
            buf_take(tail, buf_size(tail) - TAIL_BYTES);
    }
}

/* Its end, not its stderr's, is what we wait for: a daemon that it leaves behind may keep that open for ever. */
static int await(pid_t pid, int fd, Buf *tail)
{
    int status;
    int64_t end = ticks_ms() + RUN_MS;
    for (int pause_ms = 1;; pause_ms = pause_ms < 8 ? pause_ms * 2 : 8) {
        struct pollfd one = {fd, POLLIN, 0};
        pid_t done = waitpid(pid, &status, WNOHANG);
        tail_read(tail, fd);
        if (done == pid)
            return status;
        if (ticks_ms() >= end) {
            kill(-pid, SIGKILL);
            waitpid(pid, &status, 0);
            return -1;
        }
        if (poll(&one, 1, pause_ms) > 0 && one.revents & POLLHUP)
            sleep_ms(1);
    }
}

static bool run(Step *s, char **argv)
{
    int fds[2];
    char **env = field_list(s->body, T_ENV);
    if (pipe2(fds, O_CLOEXEC | O_NONBLOCK))
        return failed(s, "pipe for", argv[0]);
    fcntl(fds[1], F_SETFL, 0);
    pid_t pid = fork();
    if (!pid)
        run_child(argv, env, fds[1]);
    close(fds[1]);
    int status = pid < 0 ? -1 : await(pid, fds[0], s->tail);
    close(fds[0]);
    if (!status)
        return true;
    if (status < 0)
        failure_set(s->failure, s->name, ETIMEDOUT, 0, "\"%.250s\" did not end in time", argv[0]);
    else
        failure_set(s->failure, s->name, ECHILD, 0, "\"%.250s\" ended with %s %d", argv[0],
                    WIFEXITED(status) ? "code" : "signal", WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
    return false;
}

static bool run_do(Step *s)
{
    char **argv = field_list(s->body, T_ARGV);
    return !argv[0] || run(s, argv); /* without ARGV there is only something to undo */
}

static bool run_undo(Step *s)
{
    char **argv = field_list(s->body, T_INVERSE);
    if (argv[0] && !run(s, argv))
        buf_free(s->tail); /* whatever it says */
    return true;
}

/* Split into the directory, opened, and the last component. */
static int open_parent(const char *path, struct btrfs_volume *v)
{
    const char *slash = strrchr(path, '/');
    memset(v, 0, sizeof *v);
    if (!slash || slash == path || snprintf(v->name, sizeof v->name, "%s", slash + 1) >= (int)sizeof v->name) {
        errno = EINVAL;
        return -1;
    }
    const char *parent = request_text((Span){(const uint8_t *)path, (size_t)(slash - path)});
    return open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static bool limit_subvolume(Step *s, const char *path)
{
    struct stat st;
    static struct btrfs_lookup lookup;
    struct btrfs_limit limit = {.flags = BTRFS_MAX_RFER, .max_rfer = (uint64_t)field_int(s->body, T_SIZE, 0)};
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    lookup.tree = 0;
    lookup.object = BTRFS_ROOT_INODE;
    bool fine = fd >= 0 && !fstat(fd, &st) && st.st_ino == BTRFS_ROOT_INODE && !ioctl(fd, BTRFS_LOOKUP, &lookup);
    limit.qgroup = lookup.tree;
    if (fine && limit.max_rfer)
        fine = !ioctl(fd, BTRFS_LIMIT, &limit);
    int e = errno;
    close_fd(&fd);
    errno = e;
    return fine || failed(s, "limiting", path);
}

static bool subvolume_do(Step *s)
{
    struct btrfs_volume *v = request_alloc(sizeof *v);
    const char *path = field_text(s->body, T_PATH);
    int fd = open_parent(path, v);
    bool fine = fd >= 0 && (!ioctl(fd, BTRFS_CREATE, v) || errno == EEXIST);
    int e = errno;
    close_fd(&fd);
    errno = e;
    return fine ? limit_subvolume(s, path) : failed(s, "subvolume", path);
}

static bool subvolume_undo(Step *s)
{
    struct btrfs_volume *v = request_alloc(sizeof *v);
    const char *path = field_text(s->body, T_PATH);
    int fd = open_parent(path, v);
    bool fine = fd >= 0 && !ioctl(fd, BTRFS_DESTROY, v);
    int e = errno;
    close_fd(&fd);
    errno = e;
    return fine || e == ENOENT || e == ENOTDIR || failed(s, "deleting", path);
}

static const Kind kinds[] = {
    {"", NULL, NULL},
    {"dir", dir_do, dir_undo},
    {"file", file_do, file_undo},
    {"mount", mount_do, mount_undo},
    {"idmap", idmap_do, mount_undo},
    {"cgroup", cgroup_do, cgroup_undo},
    {"run", run_do, run_undo},
    {"subvolume", subvolume_do, subvolume_undo},
};

bool steps_do(Span body, int *fds, int nfds, Failure *f, Buf *tail)
{
    Span rest = body, nested;
    int64_t direction = field_int(body, T_OP, 0);
    Step s = {.fds = fds, .nfds = nfds, .failure = f, .tail = tail};
    failure_set(f, "request", EINVAL, 0, "no STEP, or an unknown one");
    if (direction < 0 || direction > 1 || !field_find(body, T_STEP, &nested))
        return false;
    while (field_each(&rest, T_STEP, &nested)) {
        int64_t number = field_int(nested, T_OP, 0);
        if (number < 1 || number >= (int64_t)LEN(kinds))
            return false;
        s.body = nested;
        s.name = kinds[number].name;
        if (!(direction ? kinds[number].revert : kinds[number].carry_out)(&s))
            return false;
    }
    return true;
}
