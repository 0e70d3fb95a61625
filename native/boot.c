/* The boot of a machine whose PID 1 is the agent: from the kernel's initramfs to a root in which containers can be
   made, and the port to the host.

   The order is that of need: /dev for the console, modules before anything that is a module, the real root before
   anything is mounted in it. Nothing here gives up: what fails is told on the console and left out, because a
   machine whose agent answers can say what it lacks, and one that has panicked can't. */
#include "machine.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PORT_NAME "isolat"
#define PORTS "/sys/class/virtio-ports"
#define BLOCKS "/sys/block"
#define MODULES "/modules"
#define TOOLS "run/isolat/tools"
#define LIVE "isolat.live" /* a word of the kernel's command line: volumes are shared with the host */

enum { PORT_POLL_MS = 2, PORT_SLOW_MS = 100, PORT_TELL_MS = 5000, SERVICE_PORT_MS = 30000 };

static void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void tell(const char *format, ...)
{
    char line[256];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    dprintf(2, "isolat-agent: %.*s\n", n, line);
}

static void mount_at(const char *type, const char *at, unsigned long flags, const char *options)
{
    mkdir_p(at, 0755);
    if (mount(type, at, type, flags, options) && errno != EBUSY)
        tell("%s on %s: %s", type, at, strerror(errno));
}

/* PID 1 has no descriptors when the kernel had no console yet. */
static void open_console(void)
{
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0)
        fd = open("/dev/null", O_RDWR);
    for (int i = 0; fd >= 0 && i < 3; i++)
        if (fd != i)
            dup2(fd, i);
    if (fd > 2)
        close(fd);
}

static void load_module(const char *name)
{
    char path[128];
    snprintf(path, sizeof path, MODULES "/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
        tell("%s: %s", name, strerror(errno));
    close_fd(&fd);
}

static void load_modules(const char *list)
{
    FILE *order = fopen(list, "re");
    char name[96];
    if (!order)
        return;
    while (fgets(name, sizeof name, order)) {
        name[strcspn(name, "\n")] = 0;
        if (*name && !strchr(name, '/'))
            load_module(name);
    }
    fclose(order);
}

/* Modules that few machines need cost the others neither time nor memory. */
static bool kernel_was_told(const char *word)
{
    char line[4096], *rest = line;
    if (read_small("/proc/cmdline", line, sizeof line) <= 0)
        return false;
    for (char *w; (w = strsep(&rest, " \n"));)
        if (!strcmp(w, word))
            return true;
    return false;
}

/* The initramfs's files are in memory until they are removed. */
static void forget_initramfs(void)
{
    DIR *d = opendir(MODULES);
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d));)
        unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
    rmdir(MODULES);
    unlink("/init");
}

/* pivot_root(2) refuses to work on the initramfs, and every OCI runtime needs it. */
static void move_to_real_root(void)
{
    static const char *const keep[] = {"dev", "proc", "sys"};
    mkdir("/root", 0755);
    if (mount("root", "/root", "tmpfs", 0, "mode=0755") || chdir("/root")) {
        tell("a root: %s", strerror(errno));
        return;
    }
    for (size_t i = 0; i < LEN(keep); i++) {
        char from[16];
        snprintf(from, sizeof from, "/%s", keep[i]);
        mkdir(keep[i], 0755);
        if (mount(from, keep[i], NULL, MS_MOVE, NULL))
            tell("moving %s: %s", from, strerror(errno));
    }
    if (mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        tell("moving the root: %s", strerror(errno));
}

/* Where a loader looks for itself and for libraries, and a shell for programs: in the tools, when they are there. */
static void link_tools(void)
{
    static const char *const names[] = {"bin", "lib", "lib64"};
    for (size_t i = 0; i < LEN(names); i++) {
        char target[64], at[16];
        snprintf(target, sizeof target, TOOLS "/%s", names[i]);
        snprintf(at, sizeof at, "/%s", names[i]);
        if (symlink(target, at))
            tell("%s: %s", at, strerror(errno));
    }
}

static void make_tree(void)
{
    static const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"},
                                           {"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"}};
    for (size_t i = 0; i < LEN(links); i++)
        symlink(links[i][0], links[i][1]);
    mkdir_p("/run/isolat", 0711);
    mkdir_p("/" TOOLS, 0755);
    mkdir("/tmp", 0);
    chmod("/tmp", 01777);
    link_tools();
}

static void mount_rest(void)
{
    mount_at("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5");
    mount_at("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_at("cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    if (!write_file("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids"))
        tell("control groups: %s", strerror(errno));
}

/* Each disk is a file of the host's, which sorts what it is asked for itself. */
static void leave_order_to_host(void)
{
    DIR *d = opendir(BLOCKS);
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d));) {
        char path[sizeof BLOCKS + 64];
        snprintf(path, sizeof path, BLOCKS "/%.32s/queue/scheduler", e->d_name);
        if (e->d_name[0] == 'v' && !write_file(path, "none"))
            tell("%s: %s", path, strerror(errno));
    }
    closedir(d);
}

static void make_root(void)
{
    umask(022);
    mount_at("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
    open_console();
    mount_at("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    load_modules(MODULES "/order");
    if (kernel_was_told(LIVE))
        load_modules(MODULES "/live");
    leave_order_to_host();
    forget_initramfs();
    move_to_real_root();
    mount_rest();
    make_tree();
}

static bool named_ours(const char *port)
{
    char path[sizeof PORTS + 64], name[32];
    snprintf(path, sizeof path, PORTS "/%.32s/name", port);
    return read_small(path, name, sizeof name) > 0 && !strcmp(name, PORT_NAME "\n");
}

static int try_port(void)
{
    DIR *d = opendir(PORTS);
    int fd = -1;
    if (!d)
        return -1;
    for (struct dirent *e; fd < 0 && (e = readdir(d));)
        if (e->d_name[0] != '.' && named_ours(e->d_name)) {
            char path[64];
            snprintf(path, sizeof path, "/dev/%.32s", e->d_name);
            fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
        }
    closedir(d);
    return fd;
}

/* The driver finds the device in its own time. -1: not within so many ms; a negative limit never ends. */
static int wait_for_port(int64_t limit_ms)
{
    int64_t since = ticks_ms();
    bool told = false;
    for (;;) {
        int fd = try_port();
        int64_t waited = ticks_ms() - since;
        if (fd >= 0 || (limit_ms >= 0 && waited >= limit_ms))
            return fd;
        if (!told && waited > PORT_TELL_MS) {
            tell("there is no port named " PORT_NAME " yet");
            told = true;
        }
        sleep_ms(told ? PORT_SLOW_MS : PORT_POLL_MS);
    }
}

int boot_as_pid1(void)
{
    machine_is_ours = true;
    make_root();
    return wait_for_port(-1);
}

int boot_service_port(void)
{
    machine_is_ours = true;
    int fd = wait_for_port(SERVICE_PORT_MS);
    if (fd < 0)
        die("no port named " PORT_NAME);
    return fd;
}
