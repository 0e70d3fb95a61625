/* isolat-keeper DIR: holds one environment, outside of it. docs/protocol.md, docs/adr/0002-keeper.md */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { EXIT_USAGE = 64, EXIT_HELD = 75, IDLE_S_MAX = 1000000 }; /* in ms it fits into an int */

static Source listener;

typedef struct {
    const char *dir;
    int64_t log_bytes;
    int log_files;
    int64_t idle_s;
    bool hybrid;
} Options;

static void usage(void)
{
    dprintf(2, "usage: isolat-keeper DIR [--log-bytes N] [--log-files N] [--idle-s N] [--hybrid] (a controller on descriptor 0)\n");
    exit(EXIT_USAGE);
}

static long long positive(const char *text)
{
    char *end;
    long long v = text ? strtoll(text, &end, 10) : 0;
    if (v <= 0 || *end)
        usage();
    return v;
}

static Options options(char **argv)
{
    Options o = {NULL, 10 << 20, 3, 0, false};
    for (char **a = argv + 1; *a; a++) {
        if (!strcmp(*a, "--hybrid"))
            o.hybrid = true;
        else if (!strcmp(*a, "--log-bytes"))
            o.log_bytes = positive(*++a);
        else if (!strcmp(*a, "--log-files"))
            o.log_files = (int)positive(*++a);
        else if (!strcmp(*a, "--idle-s"))
            o.idle_s = positive(*++a);
        else if (**a == '-' || o.dir)
            usage();
        else
            o.dir = *a;
    }
    if (!o.dir || o.log_files > 1000 || o.idle_s > IDLE_S_MAX)
        usage();
    return o;
}

static void take_lock(void)
{
    char text[24];
    int lock = openat(node.dir, "keeper.lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (lock < 0)
        die("keeper.lock");
    if (flock(lock, LOCK_EX | LOCK_NB))
        exit(EXIT_HELD);
    if (move_high(lock) < 0)
        die("keeper.lock");
    int pid = openat(node.dir, "keeper.pid.tmp", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int n = snprintf(text, sizeof text, "%d\n", getpid());
    if (pid < 0 || !write_all(pid, text, (size_t)n) || renameat(node.dir, "keeper.pid.tmp", node.dir, "keeper.pid"))
        die("keeper.pid");
    close(pid);
}

static void accept_ready(Source *s, uint32_t events)
{
    struct ucred who;
    socklen_t n = sizeof who;
    (void)events;
    int fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    bool known = !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &n) && (who.uid == geteuid() || who.uid == 0);
    if (!known || peer_count(PEER_CONTROLLER) >= CONTROLLERS_MAX)
        close(fd);
    else
        controller_new(move_high(fd));
}

/* Relative to DIR: the path of a socket may not be longer than 107 bytes, the path of an environment may. */
static void listen_in_dir(void)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX, .sun_path = "keeper.sock"};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    unlink("keeper.sock"); /* we hold the lock: nobody listens on it */
    mode_t mask = umask(077);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 16) || (fd = move_high(fd)) < 0)
        die("keeper.sock");
    umask(mask);
    source_init(&listener, fd, accept_ready);
    source_watch(&listener, EPOLLIN);
}

static int first_controller(void)
{
    int fd = fcntl(0, F_DUPFD_CLOEXEC, 10);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    int log = openat(node.dir, "keeper.log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0 || null < 0)
        die("descriptors");
    dup2(null, 0);
    dup2(null, 1);
    dup2(log >= 0 ? log : null, 2);
    if (null > 2)
        close(null);
    if (log > 2)
        close(log);
    return fd;
}

static void own_mounts(bool hybrid)
{
    int home = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    if (unshare(CLONE_NEWNS)) {
        close_fd(&home);
        if (errno == EPERM)
            return; /* not root: a keeper of ordinary processes works without */
        die("unshare");
    }
    node.home_mounts = move_high(home);
    /* Slaves, not private: what is unmounted outside must not stay mounted, and busy, because we once saw it. */
    if (mount("none", "/", NULL, MS_REC | MS_SLAVE, NULL))
        die("making the mounts slaves");
    /* crun 1.8 refuses hybrid cgroups where it sees the unified hierarchy */
    if (hybrid)
        umount2("/sys/fs/cgroup/unified", MNT_DETACH);
}

int main(int argc, char **argv)
{
    (void)argc;
    Options o = options(argv);
    own_mounts(o.hybrid); /* first: what is opened before holds the mounts of the namespace that we leave */
    int fd = open(o.dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || (node.dir = move_high(fd)) < 0 || fchdir(node.dir))
        die(o.dir);
    node.role = "keeper";
    node.keeper = node.holds = true;
    if (o.idle_s)
        node.idle_ms = o.idle_s * 1000;
    setsid();
    take_lock();
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    spawn_resets_oom = write_file("/proc/self/oom_score_adj", "-500");
    spawn_hides_keys = true;
    int controller = first_controller();
    node_open();
    log_open(o.log_bytes, o.log_files);
    listen_in_dir();
    if (chdir("/"))
        die("/");
    controller_new(controller);
    node_run();
    unlinkat(node.dir, "keeper.sock", 0);
    unlinkat(node.dir, "keeper.pid", 0);
    return 0;
}
