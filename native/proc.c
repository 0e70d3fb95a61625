#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

static void result_ready(Source *s, uint32_t events);

Proc *proc_find(const char *name)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (!strcmp(p->name, name))
            return p;
    return NULL;
}

/* Nobody asks any more for what another host had started. */
static void forget_unbound(void)
{
    for (Proc *p = node.procs, *next; p; p = next) {
        next = p->next;
        if (p->unbound && p->state == ENDED)
            proc_drop(p);
    }
}

Proc *proc_new(const char *name, int flags)
{
    if (node.nprocs >= PROCS_MAX)
        forget_unbound();
    if (node.nprocs >= PROCS_MAX)
        return NULL;
    Proc *p = xalloc(sizeof *p);
    p->name = strdup(name);
    p->flags = flags;
    p->master = p->result.fd = p->in.source.fd = p->out[0].source.fd = p->out[1].source.fd = -1;
    p->next = node.procs;
    node.procs = p;
    node.nprocs++;
    return p;
}

void proc_drop(Proc *p)
{
    for (Proc **at = &node.procs; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            node.nprocs--;
            break;
        }
    for (Peer *c = peers; c; c = c->next)
        if (c->kind == PEER_CLIENT && c->proc == p) {
            c->proc = NULL;
            peer_finish(c);
        }
    if (p->control)
        peer_close(p->control);
    stream_close(p);
    source_close(&p->result);
    close_fd(&p->master);
    buf_free(&p->leftover);
    home_close(p);
    after_free(p);
    free(p->pidfile);
    free(p->tail);
    free(p->name);
    p->name = p->pidfile = p->tail = NULL;
    release(p);
}

void proc_wait_start(Proc *p, Peer *who, uint32_t id)
{
    if (p->nwaiters < WAITERS_MAX)
        p->waiters[p->nwaiters++] = (Waiter){who->serial, id};
    else
        reply_error(who, id, "key", EBUSY, "too many wait for this process to start");
}

/* Answer everybody who waits for the start; the descriptor, if any, goes to the first. */
static void answer(Proc *p, uint8_t kind, Buf *body, int fd)
{
    for (int i = 0; i < p->nwaiters; i++) {
        Peer *who = peer_by_serial(p->waiters[i].peer);
        Frame f = {.kind = kind, .id = p->waiters[i].id, .body = buf_span(body)};
        if (fd >= 0 && i == 0) {
            f.nfds = 1;
            f.fds[0] = fd;
        }
        if (who)
            peer_send(who, &f);
    }
    p->nwaiters = 0;
}

void proc_started(Proc *p)
{
    Buf body = {0};
    p->state = ALIVE;
    p->started_ns = now_ns();
    if (p->flags & F_MAIN && !(p->flags & F_APART))
        node.main_spawned = true;
    put_int(&body, T_PID, p->pid);
    answer(p, K_OK, &body, p->master);
    close_fd(&p->master);
    buf_free(&body);
    if (p->tail && !(p->flags & F_WORDS)) {
        free(p->tail);
        p->tail = NULL;
    }
    client_started(p);
    stream_watch(p);
    if (p->early)
        proc_exited(p, p->code, p->signal);
}

void proc_refused(Proc *p, Buf *body)
{
    answer(p, K_ERROR, body, -1);
    client_tell_failure(p, body);
    if (!p->remote && p->pid > 0 && !p->early)
        kill(-p->pid, SIGKILL);
    if (!p->remote && p->launcher > 0)
        kill(-p->launcher, SIGKILL);
    proc_drop(p);
}

void proc_failed(Proc *p, const Failure *f)
{
    Buf body = {0};
    stream_drain(p);
    size_t n = p->tail_len < TAIL_BYTES ? p->tail_len : TAIL_BYTES;
    put_failure(&body, f, p->tail ? p->tail + p->tail_len - n : NULL, n);
    proc_refused(p, &body);
    buf_free(&body);
}

/* Started, as far as its kind demands: exec done, the launcher through, the guest has said HELLO. */
void proc_check_start(Proc *p)
{
    bool greeted = !(p->flags & F_CONTROL) || p->greeted;
    bool launched = !(p->flags & F_LAUNCHER) || p->launched;
    if (p->state != STARTING || p->result.fd >= 0 || !launched)
        return;
    if (greeted) {
        proc_started(p);
        return;
    }
    if (p->early || !p->control) {
        Failure f;
        failure_set(&f, "guest", ESRCH, 0, "it ended before its HELLO (%s %d)", p->signal ? "signal" : "code",
                    p->signal ? p->signal : p->code);
        proc_failed(p, &f);
    }
}

static void read_result(Proc *p)
{
    Failure f;
    ssize_t n = read(p->result.fd, &f, sizeof f);
    if (n < 0 && errno == EAGAIN)
        return;
    source_close(&p->result);
    if (n == sizeof f) {
        f.stage[sizeof f.stage - 1] = f.message[sizeof f.message - 1] = 0;
        proc_failed(p, &f);
        return;
    }
    proc_check_start(p);
}

static void result_ready(Source *s, uint32_t events)
{
    (void)events;
    read_result((Proc *)((char *)s - offsetof(Proc, result)));
}

static bool open_pty(int *master, int *slave, int rows, int cols)
{
    int unlock = 0;
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)cols};
    *slave = -1;
    *master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*master < 0 || ioctl(*master, TIOCSPTLCK, &unlock))
        return false;
    ioctl(*master, TIOCSWINSZ, &size);
    *slave = ioctl(*master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC); /* no path: works without /dev/pts */
    return *slave >= 0;
}

static bool make_pipe(int fds[2], int ours)
{
    if (pipe2(fds, O_CLOEXEC))
        return false;
    fcntl(fds[ours], F_SETFL, O_NONBLOCK);
    return true;
}

bool proc_streams(Proc *p, int fds[3])
{
    int pipe_fds[2];
    if (p->flags & F_STDIN) {
        if (!make_pipe(pipe_fds, 1))
            return false;
        fds[0] = pipe_fds[0];
        stream_input(p, pipe_fds[1]);
    } else if ((fds[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0) {
        return false;
    }
    for (int i = 1; i < 3; i++) {
        if (!make_pipe(pipe_fds, 0))
            return false;
        fds[i] = pipe_fds[1];
        stream_output(p, i, pipe_fds[0]);
    }
    return true;
}

/* A guest's or a launcher's own words: one pipe, drained with a cap, so that it can neither block nor fill a disk. */
static bool words_stream(Proc *p, int fds[4])
{
    int pipe_fds[2];
    if (!make_pipe(pipe_fds, 0))
        return false;
    p->tail = xalloc(WORDS_BYTES);
    stream_output(p, 2, pipe_fds[0]);
    fds[2] = pipe_fds[1];
    fds[1] = fcntl(pipe_fds[1], F_DUPFD_CLOEXEC, 10);
    return fds[1] >= 0;
}

static bool control_channel(Proc *p, int fds[4])
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        return false;
    fds[3] = pair[1];
    guest_open(p, pair[0]);
    return true;
}

static bool terminal(Proc *p, Command *c, int rows, int cols)
{
    int slave;
    if (!open_pty(&p->master, &slave, rows, cols))
        return false;
    c->tty = true;
    c->fds[0] = slave;
    c->fds[1] = fcntl(slave, F_DUPFD_CLOEXEC, 10);
    c->fds[2] = fcntl(slave, F_DUPFD_CLOEXEC, 10);
    if (!node.holds)
        return true; /* it travels with the OK */
    int fd = p->master;
    p->master = -1;
    return stream_set_master(p, fd);
}

static bool prepare(Proc *p, Command *c, int rows, int cols)
{
    int own = p->flags & F_FDS;
    if ((p->flags & F_CONTROL) && !control_channel(p, c->fds))
        return false;
    if (!own && (p->flags & F_WORDS || (p->flags & F_LAUNCHER && !node.holds)))
        return words_stream(p, c->fds);
    if (p->flags & F_LAUNCHER)
        p->tail = xalloc(WORDS_BYTES); /* its stderr is its process's: keep the end of it until that has started */
    if (p->flags & F_TTY)
        return terminal(p, c, rows, cols);
    if (own || !node.holds)
        return true;
    return proc_streams(p, c->fds);
}

bool proc_spawn(Proc *p, Command *c, int rows, int cols, Failure *f)
{
    int result = -1;
    pid_t pid = -1;
    if (prepare(p, c, rows, cols))
        pid = spawn(c, &result);
    int e = errno;
    for (int i = 0; i < CHILD_FDS; i++)
        close_fd(&c->fds[i]);
    if (pid < 0) {
        failure_set(f, "spawn", e, 0, "spawn: %s", strerror(e));
        return false;
    }
    p->state = STARTING;
    if (p->flags & F_LAUNCHER)
        p->launcher = pid;
    else
        p->pid = pid;
    source_init(&p->result, result, result_ready);
    source_watch(&p->result, EPOLLIN);
    if (p->serial)
        serial_open_guest(p);
    stream_watch(p); /* a launcher's stderr has to be read while it starts */
    return true;
}

/* Statuses of children that nobody has claimed yet: a launcher's process may end before its PIDFILE was read. */
static struct {
    pid_t pid;
    int status;
} unclaimed[64];
static unsigned unclaimed_at;

static void set_status(Proc *p, int status)
{
    p->signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    p->code = p->signal ? 128 + p->signal : WEXITSTATUS(status);
}

static bool is_child(pid_t pid)
{
    siginfo_t info;
    return !waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT);
}

static bool claim(Proc *p)
{
    char text[32];
    if (read_small(p->pidfile ? p->pidfile : "", text, sizeof text) <= 0)
        return false;
    p->pid = atoi(text);
    if (p->pid <= 1)
        return false;
    for (size_t i = 0; i < LEN(unclaimed); i++)
        if (unclaimed[i].pid == p->pid) {
            unclaimed[i].pid = 0;
            set_status(p, unclaimed[i].status);
            return p->early = true;
        }
    return is_child(p->pid);
}

static void launcher_ended(Proc *p, int status)
{
    Failure f;
    p->launcher = 0;
    if (p->result.fd >= 0)
        read_result(p);
    if (!p->name)
        return; /* its exec failed: told already, and dropped */
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        failure_set(&f, "launch", ECHILD, 0, "the launcher ended with %s %d", WIFEXITED(status) ? "code" : "signal",
                    WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
        proc_failed(p, &f);
        return;
    }
    if (!claim(p)) {
        p->pid = 0;
        failure_set(&f, "launch", ESRCH, 0, "the launcher left no process of ours in \"%.200s\"",
                    p->pidfile ? p->pidfile : "");
        proc_failed(p, &f);
        return;
    }
    p->launched = true;
    proc_check_start(p);
}

static void child_ended(Proc *p, int status)
{
    set_status(p, status);
    if (p->state == STARTING) {
        p->early = true;
        if (p->control)
            guest_ended(p);
        if (p->result.fd >= 0)
            read_result(p);
        else
            proc_check_start(p);
        return;
    }
    if (p->flags & F_CONTROL)
        guest_ended(p);
    proc_exited(p, p->code, p->signal);
}

static void one_reaped(pid_t pid, int status)
{
    if (after_ended(pid))
        return;
    for (Proc *p = node.procs; p; p = p->next) {
        if (p->remote || p->state == ENDED || p->state == DRAINING)
            continue;
        if (p->launcher == pid) {
            launcher_ended(p, status);
            return;
        }
        if (p->pid == pid && !p->early) {
            child_ended(p, status);
            return;
        }
    }
    unclaimed[unclaimed_at].pid = pid;
    unclaimed[unclaimed_at].status = status;
    unclaimed_at = (unclaimed_at + 1) % LEN(unclaimed);
    if (node.sweeping)
        kill_strays();
}

void proc_reap(void)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        one_reaped(pid, status);
}

/* MAIN's end is its guest's. What is APART ends the guest that it is in itself, and none around that: the keeper's own
   guest is another environment's. */
static bool takes_its_guest(const Proc *p)
{
    if (!(p->flags & F_MAIN) || !p->guest)
        return false;
    if (!(p->flags & F_APART))
        return true;
    return !node.keeper && !strchr(p->name + strlen(p->guest->name) + 1, '/');
}

void proc_exited(Proc *p, int code, int signal)
{
    if (after_begins(p, code, signal))
        return;
    p->state = DRAINING;
    p->code = code;
    p->signal = signal;
    p->ended_ns = now_ns();
    if (node.lacked_memory && (code || signal))
        p->oom = node.lacked_memory();
    /* MAIN's guest goes first: then nobody can write any more, and the streams can be read to their end. The same
       where the guest is gone. Elsewhere a background child may hold the stream open: take what is there. */
    if (takes_its_guest(p))
        guest_leave(p->guest);
    if (p->flags & F_BESIDE)
        guest_lost_beside(p);
    if (p->number && !p->up) {
        serial_ended(p);
    } else if (p->remote && (p->flags & F_MAIN || !p->guest)) {
        p->deadline_ms = ticks_ms() + GRACE_MS;
        stream_watch(p);
    } else {
        stream_drain(p);
    }
    proc_finish(p);
}

void proc_put_exit(Buf *b, const Proc *p)
{
    put_text(b, T_KEY, p->name);
    put_int(b, T_CODE, p->code);
    put_int(b, T_SIGNAL, p->signal);
    put_int(b, T_TIME, p->started_ns);
    put_int(b, T_TIME, p->ended_ns);
    if (p->with_guest)
        put_text(b, T_STAGE, "guest");
    if (p->oom)
        put_text(b, T_OPTIONS, "oom");
}

/* Once it is drained: record, then tell. */
void proc_finish(Proc *p)
{
    if (p->state != DRAINING || p->out[0].source.fd >= 0 || p->out[1].source.fd >= 0)
        return;
    p->state = ENDED;
    stream_close(p);
    if (p->flags & F_MAIN && node.keeper) {
        log_exit(p);
        home_close(p);
        node.main_ended = node.main_ended || !(p->flags & F_APART);
    }
    client_tell_exit(p);
    if (p->unbound)
        return;
    for (Peer *c = peers; c; c = c->next)
        if (c->kind == PEER_CONTROLLER) {
            Buf body = {0};
            proc_put_exit(&body, p);
            peer_reply(c, K_EXITED, 0, &body);
        }
}

void proc_kill(Proc *p, int signal, int scope)
{
    pid_t pid = p->pid > 0 ? p->pid : p->launcher;
    if (p->remote || pid <= 1 || p->early || (p->state != ALIVE && p->state != STARTING))
        return;
    if (p->park_ms && (signal == SIGCONT || p->parked == PARKED))
        park_woken(p); /* a signal to what is stopped would wait; SIGKILL would not, but then it is no longer parked */
    if (p->serial && signal != SIGSTOP)
        kill(pid, SIGCONT);
    kill(scope == SCOPE_PROCESS ? pid : -pid, signal);
}

static void at_most(int64_t left_ms, int *timeout_ms)
{
    if (*timeout_ms < 0 || left_ms < *timeout_ms)
        *timeout_ms = (int)left_ms;
}

void proc_tick(int64_t now_ms, int *timeout_ms)
{
    for (Proc *p = node.procs; p; p = p->next) {
        int64_t due = p->state == DRAINING ? p->deadline_ms : p->state == ALIVE ? p->kill_by_ms : 0;
        if (!due)
            continue;
        if (due > now_ms) {
            at_most(due - now_ms, timeout_ms);
        } else if (p->state == ALIVE) {
            p->kill_by_ms = 0;
            guest_kill(p);
        } else {
            stream_drain(p);
            if (stream_waits(p))
                continue; /* until the channel takes something again */
            stream_close(p);
            proc_finish(p);
        }
    }
    park_tick(now_ms, timeout_ms);
}
