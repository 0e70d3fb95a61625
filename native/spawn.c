#include "spawn.h"

#include "user.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define CLOSE_RANGE_SETS_CLOEXEC 4
/* clone3(2), which musl's headers lack */
#define NR_CLONE3 435
#define JOIN_SESSION_KEYRING 1 /* keyctl(2) */
#define INTO_CGROUP 0x200000000ull
struct birth {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

enum { OWN_FDS = 64 }; /* in the child: above all that it is to have */

bool spawn_resets_oom, spawn_hides_keys;

void failure_set(Failure *f, const char *stage, int error, int code, const char *format, ...)
{
    va_list args;
    memset(f, 0, sizeof *f);
    f->error = error;
    f->code = code;
    snprintf(f->stage, sizeof f->stage, "%s", stage);
    va_start(args, format);
    vsnprintf(f->message, sizeof f->message, format, args);
    va_end(args);
}

void child_reset(void)
{
    /* The kernel's own struct, all zero: SIG_DFL. C libraries keep 32 to 34 to themselves and would refuse them, but
     * whoever started us may have had them ignored. */
    static const unsigned long standard[8];
    sigset_t none;
    for (int n = 1; n < 65; n++)
        syscall(SYS_rt_sigaction, n, standard, NULL, 8);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(022);
}

static const char *env_get(char **env, const char *name)
{
    size_t n = strlen(name);
    for (; *env; env++)
        if (!strncmp(*env, name, n) && (*env)[n] == '=')
            return *env + n + 1;
    return NULL;
}

static bool fits(int error) { return error == ENOENT || error == ENOTDIR; }

static void exec_failed(Failure *f, const char *name, int error, bool searched)
{
    int code = error == ENOENT ? 127 : 126;
    if (searched && error == ENOENT)
        failure_set(f, "exec", error, code, "exec: \"%.200s\": not found in PATH", name);
    else
        failure_set(f, "exec", error, code, "exec: \"%.200s\": %s", name, strerror(error));
}

/* A candidate that exists but can't be run is remembered, while a later directory may still have a good one. */
static int exec_search(char **argv, char **env, const char *path)
{
    char candidate[4096];
    int worst = ENOENT;
    for (const char *at = path; at; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL) {
        int n = (int)strcspn(at, ":");
        if (snprintf(candidate, sizeof candidate, "%.*s/%s", n ? n : 1, n ? at : ".", argv[0]) >= (int)sizeof candidate)
            continue;
        execve(candidate, argv, env);
        if (!fits(errno))
            worst = errno;
        if (errno != EACCES && !fits(errno))
            break;
    }
    return worst;
}

void exec_command(char **argv, char **env, Failure *f)
{
    const char *path = env_get(env, "PATH");
    if (!argv[0] || !argv[0][0])
        return exec_failed(f, argv[0] ? argv[0] : "", ENOENT, false);
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, env);
        return exec_failed(f, argv[0], errno, false);
    }
    exec_failed(f, argv[0], exec_search(argv, env, path ? path : DEFAULT_PATH), true);
}

/* Every source above 63 first, so that none of them is overwritten before it has been moved. */
static bool place_fds(const Command *c)
{
    int from[CHILD_FDS], last = 2;
    for (int i = 0; i < CHILD_FDS; i++) {
        from[i] = c->fds[i];
        if (from[i] < 0 && i < 3 && (from[i] = open("/dev/null", (i ? O_WRONLY : O_RDONLY) | O_CLOEXEC)) < 0)
            return false;
        if (from[i] >= 0 && (from[i] = fcntl(from[i], F_DUPFD_CLOEXEC, OWN_FDS)) < 0)
            return false;
    }
    for (int i = 0; i < CHILD_FDS; i++)
        if (from[i] >= 0 && dup2(from[i], last = i) < 0)
            return false;
        else if (from[i] < 0)
            close(i); /* between what it is to have: whatever we came to life with */
    syscall(SYS_close_range, last + 1, ~0U, CLOSE_RANGE_SETS_CLOEXEC);
    return true;
}

/* What is mounted in a mount namespace of its own is nobody else's; what is unmounted elsewhere goes here, too. */
static bool own_mounts(const Command *c, Failure *f)
{
    if (!(c->spaces & CLONE_NEWNS) || !mount("none", "/", NULL, MS_REC | MS_SLAVE, NULL))
        return true;
    failure_set(f, "mounts", errno, 0, "making the mounts its own: %s", strerror(errno));
    return false;
}

/* A new PID namespace needs a /proc of its own. */
static bool own_proc(const Command *c, Failure *f)
{
    char at[4096];
    if (!*c->root || !(c->spaces & CLONE_NEWPID) || !(c->spaces & CLONE_NEWNS))
        return true;
    if (snprintf(at, sizeof at, "%s/proc", c->root) < (int)sizeof at &&
        !mount("proc", at, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
        return true;
    failure_set(f, "proc", errno, 0, "proc: \"%.200s\": %s", at, strerror(errno));
    return false;
}

static bool enter_place(const Command *c, bool grouped, Failure *f)
{
    for (char **g = c->cgroups; g && *g && !grouped; g++)
        if (!write_file(*g, "0")) {
            failure_set(f, "cgroup", errno, 0, "cgroup: \"%.200s\": %s", *g, strerror(errno));
            return false;
        }
    if (!own_mounts(c, f) || !own_proc(c, f))
        return false;
    if (*c->root && (chroot(c->root) || chdir("/"))) {
        failure_set(f, "chroot", errno, 0, "chroot: \"%.200s\": %s", c->root, strerror(errno));
        return false;
    }
    return true;
}

static bool enter_cwd(const char *cwd, Failure *f)
{
    if (!*cwd)
        cwd = "/";
    if (!chdir(cwd) || (errno == ENOENT && !mkdir_p(cwd, 0755) && !chdir(cwd)))
        return true;
    failure_set(f, "cwd", errno, 0, "cwd: \"%.200s\": %s", cwd, strerror(errno));
    return false;
}

/* Root of that user namespace, and so of nothing outside of it. */
static bool join_users(int users, Failure *f)
{
    if (!setns(users, CLONE_NEWUSER) && !setgroups(0, NULL) && !setgid(0) && !setuid(0))
        return true;
    failure_set(f, "users", errno, 0, "joining a user namespace: %s", strerror(errno));
    return false;
}

static void allow_descriptors(void)
{
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l))
        return;
    l.rlim_cur = l.rlim_max;
    setrlimit(RLIMIT_NOFILE, &l);
}

static bool become(const Command *c, User *u, Failure *f)
{
    const char *missing = user_find(c->own_users ? "" : c->user, u);
    if (missing) {
        failure_set(f, "user", ENOENT, 0, "user: \"%.100s\": %s", c->user, missing);
        return false;
    }
    if (!enter_cwd(c->cwd, f))
        return false;
    if (u->change && (setgroups(u->ngroups, u->groups) || setgid(u->gid) || setuid(u->uid))) {
        failure_set(f, "user", errno, 0, "user: \"%.100s\": %s", c->user, strerror(errno));
        return false;
    }
    return true;
}

/* The environment with HOME, when it was not given. The child's memory ends with exec, so nothing is freed. */
static char **with_home(char **env, const char *home)
{
    size_t n = 0;
    if (env_get(env, "HOME"))
        return env;
    while (env[n])
        n++;
    char **more = calloc(n + 2, sizeof *more);
    char *text = malloc(strlen(home) + 8);
    if (!more || !text)
        return env;
    memcpy(more, env, n * sizeof *more);
    sprintf(text, "HOME=%s", *home ? home : "/");
    more[n] = text;
    return more;
}

/* In a PID namespace of its own it sees no parent. But the parent reads the report, and its descriptors are closed
   before its children are told of its death (do_exit() of the kernel). */
static bool is_orphan(const Command *c, pid_t parent, int report)
{
    struct pollfd reader = {report, 0, 0};
    return c->spaces & CLONE_NEWPID ? poll(&reader, 1, 0) != 0 : getppid() != parent;
}

/* Last, for from then on it is the guest's as far as we care: what it may write, ask the kernel for, and gain. */
static bool confine(const Command *c, Failure *f)
{
    struct rlimit most = {(rlim_t)c->file_bytes, (rlim_t)c->file_bytes};
    if (c->file_bytes > 0 && setrlimit(RLIMIT_FSIZE, &most))
        failure_set(f, "spawn", errno, 0, "the size of files: %s", strerror(errno));
    else if ((c->spaces || c->confined) && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        failure_set(f, "spawn", errno, 0, "no_new_privs: %s", strerror(errno));
    else if (c->confined && !filter_install())
        failure_set(f, "filter", errno, 0, "the system call filter: %s", strerror(errno));
    else
        return true;
    return false;
}

static void child(const Command *c, pid_t parent, bool grouped, int report, Failure *f)
{
    User u;
    int users = c->own_users ? fcntl(c->users, F_DUPFD_CLOEXEC, OWN_FDS) : -1;
    setsid();
    child_reset();
    if (c->lowest_priority)
        syscall(SYS_sched_setscheduler, 0, SCHED_IDLE, &(struct sched_param){0}); /* musl's does nothing */
    if (spawn_hides_keys)
        syscall(SYS_keyctl, JOIN_SESSION_KEYRING, NULL); /* else whatever the daemon was started with could be read */
    if (spawn_resets_oom)
        write_file("/proc/self/oom_score_adj", "0");
    if (!place_fds(c))
        return failure_set(f, "stdio", errno, 0, "stdio: %s", strerror(errno));
    if (c->tty && ioctl(0, TIOCSCTTY, 0))
        return failure_set(f, "tty", errno, 0, "tty: %s", strerror(errno));
    if (c->many_descriptors)
        allow_descriptors();
    if (!enter_place(c, grouped, f) || (c->own_users && !join_users(users, f)) || !become(c, &u, f))
        return;
    if (!confine(c, f))
        return;
    /* after setuid, which clears it; the parent may have died before */
    if (c->orphan_dies && (prctl(PR_SET_PDEATHSIG, SIGKILL), is_orphan(c, parent, report)))
        _exit(70);
    exec_command(c->argv, with_home(c->env, u.home), f);
}

/* The directory of the one control group that it joins; -1: there is none, or there are several. */
static int group_directory(const Command *c)
{
    char path[512];
    if (!c->cgroups || !c->cgroups[0] || c->cgroups[1])
        return -1;
    const char *slash = strrchr(c->cgroups[0], '/');
    if (!slash || snprintf(path, sizeof path, "%.*s", (int)(slash - c->cgroups[0]), c->cgroups[0]) >= (int)sizeof path)
        return -1;
    return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* Born in its control group it need not move there, which waits for the whole machine and takes much code. Where that
   can't be (cgroup v1, kernels before 5.7, a group with all the processes it may have) it moves. */
static pid_t start(const Command *c, bool *grouped)
{
    struct birth b = {.flags = INTO_CGROUP | (unsigned)c->spaces, .exit_signal = SIGCHLD};
    pid_t pid = -1;
    int group = group_directory(c);
    if (group >= 0) {
        b.cgroup = (uint64_t)group;
        pid = (pid_t)syscall(NR_CLONE3, &b, sizeof b);
        close(group);
    }
    *grouped = pid >= 0;
    if (pid >= 0)
        return pid;
    return c->spaces ? (pid_t)syscall(SYS_clone, SIGCHLD | c->spaces, NULL, NULL, NULL, NULL) : fork();
}

pid_t spawn(const Command *c, int *result)
{
    int pipe_fds[2];
    bool grouped;
    Failure f;
    pid_t parent = getpid();
    if (pipe2(pipe_fds, O_CLOEXEC))
        return -1;
    pid_t pid = start(c, &grouped);
    if (!pid) {
        int report = fcntl(pipe_fds[1], F_DUPFD_CLOEXEC, OWN_FDS);
        close(pipe_fds[0]);
        signal(SIGPIPE, SIG_IGN);
        child(c, parent, grouped, report, &f);
        write_all(report, &f, sizeof f);
        _exit(f.code ? f.code : 125);
    }
    int e = errno;
    close(pipe_fds[1]);
    *result = pipe_fds[0];
    if (pid < 0)
        close_fd(result);
    else
        fcntl(*result, F_SETFL, O_NONBLOCK);
    errno = e;
    return pid;
}
