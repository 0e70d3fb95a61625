/* IDLE: will anything in here run by itself, and when? Answered from what the kernel tells about every process of a
   user, so a machine can be stopped without anybody noticing. The rule: when in doubt, busy.

   A task is at rest when it is stopped or asleep in a system call that waits for somebody else without a deadline
   (/proc/PID/task/TID/syscall, proc(5)), and its process has no timer that could wake it: timerfds (fdinfo),
   timer_create(2) (/proc/PID/timers), setitimer(2) (/proc/timer_list, where the whole machine is ours), time limits
   of sockets (SO_RCVTIMEO). Where a deadline is absolute, what is left is known. When a relative one began is not, so
   the first timer that wakes a task (/proc/timer_list) counts for it; where that can't be asked, it counts as near.
   Only what is years away is never: that is how programs say so that have to name a time.

   What it does not see: timers of the kernel itself, such as those of open TCP connections, and io_uring's, whose
   waiters count as busy. An agent that is no machine's (tests) looks at its own descendants only. */
#include "machine.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NR_PIDFD_OPEN 434
#define NR_PIDFD_GETFD 438

#define NEVER INT64_MAX
#define NEVER_S (10ll * 365 * 86400) /* `sleep infinity` arms the end of time, Java's longest wait is 3 years */
#define KTHREAD 0x00200000 /* PF_KTHREAD, include/linux/sched.h */
#define LOW_STACK (1ull << 32)

enum { FUTEX_WAIT = 0, FUTEX_LOCK_PI = 6, FUTEX_WAIT_BITSET = 9, FUTEX_WAIT_REQUEUE_PI = 11, FUTEX_LOCK_PI2 = 13 };
enum { FUTEX_COMMAND = 127, FUTEX_REALTIME = 256 };

typedef struct {
    pid_t pid;
    long number;
    uint64_t arg[6];
} Call;

typedef enum {
    WAITS,    /* for somebody else, without a deadline */
    WAITS_FD, /* the same, on a descriptor, which may be a socket with a time limit */
    SPAN,     /* arg points at a time that is relative, or is NULL */
    MILLIS,   /* arg is a time in ms, negative: none */
    SLEEP,    /* clock_nanosleep */
    FUTEX,
} How;

typedef struct {
    long number;
    How how;
    int arg;
} Kind;

static const Kind kinds[] = {
    {SYS_read, WAITS_FD, 0}, {SYS_readv, WAITS_FD, 0}, {SYS_write, WAITS_FD, 0}, {SYS_writev, WAITS_FD, 0},
    {SYS_recvfrom, WAITS_FD, 0}, {SYS_recvmsg, WAITS_FD, 0}, {SYS_sendto, WAITS_FD, 0}, {SYS_sendmsg, WAITS_FD, 0},
    {SYS_accept, WAITS_FD, 0}, {SYS_accept4, WAITS_FD, 0}, {SYS_connect, WAITS_FD, 0},
    {SYS_wait4, WAITS, 0}, {SYS_waitid, WAITS, 0}, {SYS_rt_sigsuspend, WAITS, 0}, {SYS_flock, WAITS, 0},
    {SYS_fcntl, WAITS, 0}, {SYS_openat, WAITS, 0}, {SYS_msgrcv, WAITS, 0}, {SYS_msgsnd, WAITS, 0},
    {SYS_semop, WAITS, 0}, {SYS_splice, WAITS, 0}, {SYS_tee, WAITS, 0},
    {SYS_rt_sigtimedwait, SPAN, 2}, {SYS_ppoll, SPAN, 2}, {SYS_pselect6, SPAN, 4}, {SYS_semtimedop, SPAN, 3},
    {SYS_epoll_pwait, MILLIS, 3}, {SYS_nanosleep, SPAN, 0}, {SYS_clock_nanosleep, SLEEP, 0}, {SYS_futex, FUTEX, 0},
#ifdef SYS_pause /* what only x86 has */
    {SYS_pause, WAITS, 0}, {SYS_open, WAITS, 0}, {SYS_poll, MILLIS, 2}, {SYS_epoll_wait, MILLIS, 3},
    {SYS_select, SPAN, 4},
#endif
};

static bool at_path(char *into, size_t size, pid_t pid, const char *rest)
{
    return snprintf(into, size, "/proc/%d/%s", (int)pid, rest) < (int)size;
}

/* A timespec or timeval of the process: seconds first in both. */
static bool peek_time(pid_t pid, uint64_t at, int64_t time[2])
{
    char path[32];
    at_path(path, sizeof path, pid, "mem");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = pread(fd, time, 16, (off_t)at);
    close(fd);
    return n == 16;
}

/* Of all tasks, in ms: " #1: <0>, hrtimer_wakeup, S:01", and in the next line "[in 4966 to 5016 nsecs]". What is told of
   a relative wait is exact, whatever its clock: it is kept by the monotonic one (kernel/time/hrtimer.c). */
static int64_t first_wakeup(void)
{
    FILE *f = fopen("/proc/timer_list", "re");
    char line[256];
    bool wakes = false;
    int64_t first = NEVER;
    if (!f)
        return 0;
    while (fgets(line, sizeof line, f)) {
        const char *in = wakes ? strstr(line, "[in ") : NULL;
        if (in) {
            int64_t left = strtoll(in + 4, NULL, 10) / 1000000;
            if (left < first)
                first = left > 0 ? left : 0;
        }
        wakes = strstr(line, " hrtimer_wakeup") != NULL;
    }
    fclose(f);
    return first == NEVER ? 0 : first; /* somebody was to be woken: it has just happened */
}

static int64_t left_of_seconds(int64_t seconds)
{
    if (seconds >= NEVER_S)
        return NEVER;
    return machine_is_ours ? first_wakeup() : 0;
}

static int64_t left_of_span(pid_t pid, uint64_t at)
{
    int64_t time[2];
    if (!at)
        return NEVER;
    return peek_time(pid, at, time) ? left_of_seconds(time[0]) : 0;
}

static int64_t left_of_ms(int32_t ms)
{
    return ms < 0 ? NEVER : ms ? left_of_seconds(ms / 1000) : 0;
}

static int64_t left_until(pid_t pid, uint64_t at, clockid_t clock)
{
    int64_t time[2];
    struct timespec now;
    if (!at)
        return NEVER;
    if (!peek_time(pid, at, time) || clock_gettime(clock, &now))
        return 0;
    if (time[0] >= NEVER_S + now.tv_sec)
        return NEVER;
    int64_t left = (time[0] - now.tv_sec) * 1000 + (time[1] - now.tv_nsec) / 1000000;
    return left > 0 ? left : 0;
}

static int64_t left_of_sleep(const Call *c)
{
    if (c->arg[1] & TIMER_ABSTIME)
        return left_until(c->pid, c->arg[2], (clockid_t)c->arg[0]);
    switch ((clockid_t)c->arg[0]) {
    case CLOCK_REALTIME:
    case CLOCK_MONOTONIC:
    case CLOCK_BOOTTIME:
        return left_of_span(c->pid, c->arg[2]);
    }
    return 0; /* of processor time, or of a clock that is only kept as a time of day */
}

static int64_t left_of_futex(const Call *c)
{
    clockid_t clock = c->arg[1] & FUTEX_REALTIME ? CLOCK_REALTIME : CLOCK_MONOTONIC;
    switch (c->arg[1] & FUTEX_COMMAND) {
    case FUTEX_WAIT:
        return left_of_span(c->pid, c->arg[3]);
    case FUTEX_LOCK_PI:
        return left_until(c->pid, c->arg[3], CLOCK_REALTIME);
    case FUTEX_WAIT_BITSET:
    case FUTEX_WAIT_REQUEUE_PI:
    case FUTEX_LOCK_PI2:
        return left_until(c->pid, c->arg[3], clock);
    }
    return 0;
}

static int borrow_fd(pid_t pid, int fd)
{
    int process = (int)syscall(NR_PIDFD_OPEN, pid, 0);
    if (process < 0)
        return -1;
    int ours = (int)syscall(NR_PIDFD_GETFD, process, fd, 0);
    close(process);
    return ours;
}

static bool limited(int fd, int option)
{
    struct timeval limit = {0};
    socklen_t n = sizeof limit;
    return !getsockopt(fd, SOL_SOCKET, option, &limit, &n) && (limit.tv_sec || limit.tv_usec);
}

static int64_t left_of_fd(pid_t pid, int fd)
{
    int ours = borrow_fd(pid, fd);
    if (ours < 0)
        return 0;
    bool near = limited(ours, SO_RCVTIMEO) || limited(ours, SO_SNDTIMEO);
    close(ours);
    return near ? 0 : NEVER;
}

static int64_t left_of_call(const Call *c)
{
    const Kind *k = kinds, *end = kinds + LEN(kinds);
    while (k < end && k->number != c->number)
        k++;
    if (k == end)
        return 0;
    switch (k->how) {
    case WAITS:
        return NEVER;
    case WAITS_FD:
        return left_of_fd(c->pid, (int)c->arg[0]);
    case SPAN:
        return left_of_span(c->pid, c->arg[k->arg]);
    case MILLIS:
        return left_of_ms((int32_t)c->arg[k->arg]);
    case SLEEP:
        return left_of_sleep(c);
    case FUTEX:
        return left_of_futex(c);
    }
    return 0;
}

/* "0 0x3 0x7f… … SP PC"; "running"; "-1 SP PC". A stack below 4 GiB is a 32-bit program's, whose numbers differ. */
static bool parse_call(const char *text, Call *c)
{
    uint64_t stack;
    return sscanf(text, "%ld %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64,
                  &c->number, &c->arg[0], &c->arg[1], &c->arg[2], &c->arg[3], &c->arg[4], &c->arg[5], &stack) == 8 &&
           stack >= LOW_STACK;
}

typedef struct {
    char state;
    pid_t parent;
    unsigned flags;
} Stat;

/* proc_pid_stat(5): the name in parentheses may hold anything, so the rest is read after the last one. */
static bool parse_stat(const char *text, Stat *s)
{
    const char *rest = strrchr(text, ')');
    return rest && sscanf(rest, ") %c %d %*d %*d %*d %*d %u", &s->state, &s->parent, &s->flags) == 3;
}

/* How often each task has left its processor, of all that were looked at. Not from schedstat: a task that is woken
   before it was taken off the queue (delayed dequeue, Linux 6.12) is not counted there. */
static uint64_t runs;

static void count_runs(pid_t pid, const char *tid)
{
    char path[64], text[4096];
    unsigned long long by_itself = 0, by_force = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%.16s/status", (int)pid, tid);
    ssize_t n = read_small(path, text, sizeof text);
    const char *line = n > 0 ? strstr(text, "\nvoluntary_ctxt_switches:") : NULL;
    if (line)
        sscanf(line, " voluntary_ctxt_switches: %llu nonvoluntary_ctxt_switches: %llu", &by_itself, &by_force);
    runs += strtoull(tid, NULL, 10) * 0x9e3779b97f4a7c15 + (by_itself + by_force) * 0xbf58476d1ce4e5b9;
}

static int64_t left_of_waiting(pid_t pid, const char *tid)
{
    char path[64], text[512];
    Stat s;
    Call c = {.pid = pid};
    snprintf(path, sizeof path, "/proc/%d/task/%.16s/stat", (int)pid, tid);
    if (read_small(path, text, sizeof text) <= 0)
        return NEVER; /* it has just gone; whoever waited for it is looked at by itself */
    if (!parse_stat(text, &s))
        return 0;
    if (strchr("ZXT", s.state))
        return NEVER;
    if (s.state != 'S')
        return 0;
    snprintf(path, sizeof path, "/proc/%d/task/%.16s/syscall", (int)pid, tid);
    if (read_small(path, text, sizeof text) <= 0 || !parse_call(text, &c))
        return 0;
    return left_of_call(&c);
}

/* Counted before and after, so that it can't have run in between either. */
static int64_t left_of_task(pid_t pid, const char *tid)
{
    count_runs(pid, tid);
    int64_t left = left_of_waiting(pid, tid);
    count_runs(pid, tid);
    return left;
}

static void sooner(int64_t *left, int64_t other)
{
    if (other < *left)
        *left = other;
}

/* Every entry of a directory of /proc, until one says that something is near. */
static int64_t least(pid_t pid, const char *directory, int64_t (*left_of)(pid_t, const char *))
{
    char path[32];
    int64_t left = NEVER;
    at_path(path, sizeof path, pid, directory);
    DIR *d = opendir(path);
    if (!d)
        return errno == ENOENT || errno == ESRCH ? NEVER : 0;
    for (struct dirent *e; left > 0 && (e = readdir(d));)
        if (e->d_name[0] != '.')
            sooner(&left, left_of(pid, e->d_name));
    closedir(d);
    return left;
}

/* "it_value: (7, 499999999)": seconds and nanoseconds until it fires; both 0: not armed. */
static int64_t left_of_timerfd(pid_t pid, const char *fd)
{
    char path[64], text[512];
    long long seconds, nanoseconds;
    snprintf(path, sizeof path, "/proc/%d/fd/%.16s", (int)pid, fd);
    ssize_t n = readlink(path, text, sizeof text - 1);
    if (n < 0)
        return NEVER;
    text[n] = 0;
    if (strcmp(text, "anon_inode:[timerfd]"))
        return NEVER;
    snprintf(path, sizeof path, "/proc/%d/fdinfo/%.16s", (int)pid, fd);
    if (read_small(path, text, sizeof text) <= 0)
        return NEVER;
    const char *value = strstr(text, "it_value: (");
    if (!value || sscanf(value, "it_value: (%lld, %lld)", &seconds, &nanoseconds) != 2)
        return 0;
    if (seconds >= NEVER_S || (!seconds && !nanoseconds))
        return NEVER;
    return seconds * 1000 + nanoseconds / 1000000;
}

static bool has_posix_timers(pid_t pid)
{
    char path[32], text[64];
    at_path(path, sizeof path, pid, "timers");
    return read_small(path, text, sizeof text) > 0;
}

static int64_t left_of_process(pid_t pid)
{
    int64_t left = least(pid, "task", left_of_task);
    if (left > 0)
        sooner(&left, least(pid, "fd", left_of_timerfd));
    if (left > 0 && has_posix_timers(pid))
        left = 0;
    return left;
}

static bool process_of_user(pid_t pid, Stat *s)
{
    char path[32], text[512];
    at_path(path, sizeof path, pid, "stat");
    return read_small(path, text, sizeof text) > 0 && parse_stat(text, s) && !(s->flags & KTHREAD);
}

static bool descends(pid_t pid, pid_t ancestor)
{
    Stat s;
    for (int depth = 0; pid > 1 && depth < 64; depth++) {
        if (!process_of_user(pid, &s))
            return false;
        if (s.parent == ancestor)
            return true;
        pid = s.parent;
    }
    return false;
}

/* setitimer(2) is told nowhere in /proc/PID; the kernel's list of all timers names its function. */
static bool any_itimer(void)
{
    FILE *f = fopen("/proc/timer_list", "re");
    char line[256];
    bool found = false;
    if (!f)
        return false;
    while (!found && fgets(line, sizeof line, f))
        found = strstr(line, " it_real_fn") != NULL;
    fclose(f);
    return found;
}

static int64_t look(void)
{
    int64_t left = NEVER;
    pid_t self = getpid();
    Stat s;
    runs = 0;
    DIR *d = opendir("/proc");
    if (!d)
        return 0;
    for (struct dirent *e; left > 0 && (e = readdir(d));) {
        pid_t pid = (pid_t)strtol(e->d_name, NULL, 10);
        if (pid <= 0 || pid == self)
            continue;
        s.flags = 0;
        if (process_of_user(pid, &s) && (machine_is_ours || descends(pid, self)))
            sooner(&left, left_of_process(pid));
        else if (machine_is_ours && !(s.flags & KTHREAD))
            left = 0; /* listed, and gone: somebody runs, if only who waited for it and was looked at before */
    }
    closedir(d);
    if (left > 0 && machine_is_ours && any_itimer())
        left = 0;
    return left;
}

/* Processes are looked at one after the other: one that was found waiting may be woken by one that has not been looked
   at yet, and which then waits in its turn. So a second look must find the same tasks, all of them still waiting, and
   none of them may have run since: then there was a moment between the two in which nothing ran. */
int64_t idle_ms(void)
{
    int64_t left = look();
    if (left <= 0)
        return left;
    uint64_t before = runs;
    left = look();
    if (runs != before)
        return 0;
    return left == NEVER ? -1 : left;
}
