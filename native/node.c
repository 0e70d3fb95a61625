#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { IDLE_MS = 60000, RETRY_MS = 20, AWAY_MS = 100 };

Node node = {.dir = -1, .home_mounts = -1, .idle_ms = IDLE_MS};
static Source children;

static void controller_gone(Peer *p);
static void controller_drained(Peer *p);
static const PeerOps controller_ops = {request_handle, controller_gone, controller_drained};

static void controller_drained(Peer *p) { serial_drained(p); }

Peer *controller_new(int fd) { return peer_new(fd, PEER_CONTROLLER, &controller_ops); }

Peer *controller_new_serial(int fd)
{
    Peer *p = controller_new(fd);
    p->device = !p->passes_fds;
    p->passes_fds = false;
    p->patient = true;
    return p;
}

/* A port whose other end is closed is not watched: it would report nothing but that. */
static void look_again(int *timeout_ms)
{
    for (Peer *p = peers; p; p = p->next)
        if (p->device && !p->source.events && !peer_look(p))
            *timeout_ms = *timeout_ms < 0 || *timeout_ms > AWAY_MS ? AWAY_MS : *timeout_ms;
}

static void controller_gone(Peer *p)
{
    node.idle_since_ms = ticks_ms();
    hush_controller_gone(p);
    if (!node.keeper)
        node_quit(NULL, 0);
}

static void children_ready(Source *s, uint32_t events)
{
    struct signalfd_siginfo info;
    (void)events;
    while (read(s->fd, &info, sizeof info) > 0)
        ;
    proc_reap();
}

void node_open(void)
{
    sigset_t set;
    static const int deaf[] = {SIGPIPE, SIGHUP, SIGINT, SIGTERM, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM};
    for (size_t i = 0; i < LEN(deaf); i++)
        signal(deaf[i], SIG_IGN);
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_SETMASK, &set, NULL);
    umask(022);
    loop_open();
    int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0 || (fd = move_high(fd)) < 0)
        die("signalfd");
    source_init(&children, fd, children_ready);
    source_watch(&children, EPOLLIN);
    node.idle_since_ms = ticks_ms();
}

static bool is_ours(pid_t pid)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (!p->remote && (p->pid == pid || p->launcher == pid))
            return true;
    return false;
}

bool launching(void)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (p->launcher)
            return true;
    return false;
}

bool node_busy(void)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (p->state == STARTING || p->state == DRAINING)
            return true;
    return loop_more();
}

bool signal_strays(int signal, bool all_children)
{
    char path[64], text[8192], *at = text, *end;
    bool found = false;
    snprintf(path, sizeof path, "/proc/self/task/%d/children", getpid());
    if (read_small(path, text, sizeof text) <= 0)
        return false;
    /* a number without its space may have been cut short, and would be somebody else's */
    for (long pid; (pid = strtol(at, &end, 10)) > 1 && *end == ' '; at = end)
        if (all_children || !is_ours((pid_t)pid)) {
            kill((pid_t)pid, signal);
            found = true;
        }
    return found;
}

void kill_strays(void)
{
    /* while a launcher works, its process is still unknown to us: it would look like an orphan */
    if (node.quitting || !launching())
        node.sweeping = signal_strays(SIGKILL, node.quitting); /* the orphans' children become ours in turn */
}

void node_quit(Peer *who, uint32_t id)
{
    if (node.quitting) {
        if (who)
            reply_ok(who, id);
        return;
    }
    node.quitting = true;
    node.quit_by_ms = ticks_ms() + GRACE_MS;
    node.quitter = (Waiter){who ? who->serial : 0, id};
}

static bool childless(void)
{
    siginfo_t info;
    return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) && errno == ECHILD;
}

static bool settled(void)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (p->state == DRAINING)
            return false;
    for (Peer *c = peers; c; c = c->next)
        if (c->closing)
            return false;
    return true;
}

static void quit_turn(int64_t now_ms, int *timeout_ms)
{
    kill_all(SIGKILL, true);
    if (!node.pid1)
        kill_strays();
    proc_reap();
    if ((childless() && settled()) || now_ms >= node.quit_by_ms) {
        Peer *who = peer_by_serial(node.quitter.peer);
        if (who)
            reply_ok(who, node.quitter.id);
        node.done = true;
    }
    *timeout_ms = RETRY_MS;
}

static bool clients_closing(void)
{
    for (Peer *c = peers; c; c = c->next)
        if (c->kind == PEER_CLIENT && c->closing)
            return true;
    return false;
}

static bool guest_leaves(void)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (p->state == ALIVE && p->kill_by_ms)
            return true;
    return false;
}

/* A keeper outlives its controllers for its MAIN's sake, and for nothing else. */
static void keeper_turn(int64_t now_ms, int *timeout_ms)
{
    if (peer_count(PEER_CONTROLLER))
        return;
    if (node.main_ended) {
        if (!clients_closing() && !guest_leaves())
            node_quit(NULL, 0);
    } else if (!node.main_spawned) {
        int64_t left = node.idle_since_ms + node.idle_ms - now_ms;
        if (left <= 0)
            node_quit(NULL, 0);
        else if (*timeout_ms < 0 || left < *timeout_ms)
            *timeout_ms = (int)left;
    }
}

void node_run(void)
{
    while (!node.done) {
        int timeout = -1;
        int64_t now = ticks_ms();
        proc_tick(now, &timeout);
        look_again(&timeout);
        if (node.on_turn)
            node.on_turn();
        if (node.keeper && !node.quitting)
            keeper_turn(now, &timeout);
        if (node.quitting)
            quit_turn(now, &timeout);
        if (!node.done)
            loop_turn(timeout);
    }
}
