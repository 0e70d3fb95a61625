/* What a controller may ask, and the little that a client may. */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DAY_MS = 86400000 };
enum { SPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET };
enum { OWN_IDS = 65536 };

void put_failure(Buf *b, const Failure *f, const char *tail, size_t n)
{
    put_text(b, T_STAGE, f->stage);
    put_int(b, T_ERRNO, f->error);
    put_text(b, T_MESSAGE, f->message);
    if (f->code)
        put_int(b, T_CODE, f->code);
    if (tail && n)
        put_bytes(b, T_TAIL, tail, n);
}

void reply_ok(Peer *who, uint32_t id)
{
    if (id)
        peer_reply(who, K_OK, id, NULL);
}

void reply_error(Peer *who, uint32_t id, const char *stage, int error, const char *message)
{
    Failure f;
    Buf body = {0};
    if (!id)
        return;
    failure_set(&f, stage, error, 0, "%s", message);
    put_failure(&body, &f, NULL, 0);
    peer_reply(who, K_ERROR, id, &body);
}

static void no_such_key(Peer *who, uint32_t id) { reply_error(who, id, "key", ENOENT, "no process has this key"); }

/* TO/KEY. False, with an answer: one of them can't be a name. */
static bool full_name(Peer *who, const Frame *f, char name[MAX_NAME + 1])
{
    const char *to = field_text(f->body, T_TO), *key = field_text(f->body, T_KEY);
    bool odd = !*key || strchr(key, '/') || *to == '/' || strstr(to, "//") || (*to && to[strlen(to) - 1] == '/');
    if (odd || strlen(to) + strlen(key) + 1 > MAX_NAME) {
        reply_error(who, f->id, "key", EINVAL, "this is no name for a process");
        return false;
    }
    strcpy(name, to);
    if (*to)
        strcat(name, "/");
    strcat(name, key);
    return true;
}

static void hello(Peer *who, const Frame *f)
{
    Buf body = {0};
    if (field_int(f->body, T_VERSION, 0) != WIRE_VERSION) {
        reply_error(who, f->id, "hello", EPROTONOSUPPORT, "this side speaks version 1 of the protocol");
        return;
    }
    put_int(&body, T_VERSION, WIRE_VERSION);
    put_text(&body, T_ROLE, node.role);
    put_int(&body, T_PID, getpid());
    put_int(&body, T_FLAGS, FLAGS_KNOWN);
    peer_reply(who, K_OK, f->id, &body);
}

static void step(Peer *who, Frame *f)
{
    Failure failure;
    Buf tail = {0}, body = {0};
    if (steps_do(f->body, f->fds, f->nfds, &failure, &tail)) {
        reply_ok(who, f->id);
    } else {
        put_failure(&body, &failure, (char *)tail.p + tail.at, buf_size(&tail));
        peer_reply(who, K_ERROR, f->id, &body);
    }
    buf_free(&tail);
}

/* For the child's descriptor `at`. Negative, with the reason: it can't have it. */
static int copy_held(const char *name, int at, Failure *failure)
{
    int fd = held_fd(name), copy = -1;
    if (at >= CHILD_FDS)
        failure_set(failure, "held", E2BIG, 0, "a process gets at most %d of them", CHILD_FDS - HELD_FIRST);
    else if (fd < 0)
        failure_set(failure, "held", ENOENT, 0, "no descriptor \"%.100s\" is held", name);
    else if ((copy = fcntl(fd, F_DUPFD_CLOEXEC, HELD_FIRST)) < 0)
        failure_set(failure, "held", errno, 0, "\"%.100s\": %s", name, strerror(errno));
    return copy;
}

/* The child's 4, 5, … */
static bool held_into(const Frame *f, Command *c, Failure *failure)
{
    char **names = field_list(f->body, T_HELD);
    for (int at = HELD_FIRST; *names; at++, names++) {
        int fd = copy_held(*names, at, failure);
        if (fd < 0) {
            for (int i = HELD_FIRST; i < at; i++)
                close_fd(&c->fds[i]);
            return false;
        }
        c->fds[at] = fd;
    }
    return true;
}

/* NEWUSER: USER is the first of the ids that are 0 to 65,535 there. Its namespace is made here, because who writes the
   maps has to be outside of it. */
static bool own_users(const Frame *f, Command *c, Failure *failure)
{
    char map[64], *end;
    unsigned long first = strtoul(c->user, &end, 10);
    if (!(field_int(f->body, T_SPACES, 0) & CLONE_NEWUSER))
        return true;
    if (!*c->user || *end || !first || first > UINT32_MAX - OWN_IDS || *c->root || !c->spaces) {
        failure_set(failure, "users", EINVAL, 0, "users of its own need a first number, further namespaces and no root");
        return false;
    }
    snprintf(map, sizeof map, "0 %lu %d\n", first, OWN_IDS);
    c->users = userns_with(map);
    c->own_users = c->users >= 0;
    if (!c->own_users)
        failure_set(failure, "users", errno, 0, "a user namespace: %s", strerror(errno));
    return c->own_users;
}

static bool spawn_local(Proc *p, Frame *f, Failure *failure)
{
    Command c = {0};
    memset(c.fds, -1, sizeof c.fds);
    c.argv = field_list(f->body, T_ARGV);
    c.env = field_list(f->body, T_ENV);
    c.cgroups = field_list(f->body, T_CGROUP);
    c.cwd = field_text(f->body, T_CWD);
    c.user = field_text(f->body, T_USER);
    c.root = field_text(f->body, T_ROOT);
    /* An init is not killed with us but told by its channel's end: it has to kill what it holds first. */
    c.orphan_dies = p->serial || !(p->flags & (F_LAUNCHER | F_CONTROL));
    c.spaces = (int)field_int(f->body, T_SPACES, 0) & SPACES;
    c.many_descriptors = p->flags & F_BESIDE;
    c.confined = p->flags & F_CONFINED;
    c.file_bytes = field_int(f->body, T_SIZE, 0);
    if (!own_users(f, &c, failure))
        return false;
    if (!held_into(f, &c, failure)) {
        if (c.own_users)
            close(c.users);
        return false;
    }
    if (node.on_spawn && !(p->flags & (F_CONTROL | F_LAUNCHER)))
        node.on_spawn(&c);
    if (p->flags & F_LAUNCHER)
        p->pidfile = strdup(field_text(f->body, T_PIDFILE));
    if (p->flags & F_FDS)
        for (int i = 0; i < 3; i++) {
            c.fds[i] = f->fds[i];
            f->fds[i] = -1;
        }
    bool fine = proc_spawn(p, &c, (int)field_int(f->body, T_ROWS, 0), (int)field_int(f->body, T_COLS, 0), failure);
    if (c.own_users)
        close(c.users);
    return fine;
}

/* Log and record are kept here. An environment of its own is one as far as to the guest that it is in. */
static int flags_inside(const Proc *p, const char *rest)
{
    int flags = p->flags;
    if (flags & F_APART)
        flags &= *rest ? ~0 : ~(F_MAIN | F_APART);
    else if (node.holds)
        flags &= ~F_MAIN;
    return node.holds ? flags & ~F_LOG : flags;
}

/* Through a guest. Its streams stay here: the guest gets their other ends. */
static bool spawn_remote(Proc *p, Frame *f, const char *to, Failure *failure)
{
    const char *rest;
    Proc *guest = forward_guest(to, &rest);
    p->remote = true;
    if (!guest) {
        failure_set(failure, "guest", ESRCH, 0, "no guest \"%.200s\" is there", to);
        return false;
    }
    int flags = flags_inside(p, rest);
    if (guest->serial && (f->nfds || !node.keeper)) {
        failure_set(failure, "guest", EOPNOTSUPP, 0, "nothing but frames can travel to this guest");
        return false;
    }
    if (guest->serial) {
        if (!(flags & F_CONTROL))
            serial_started_remote(p);
    } else if (node.holds && !(flags & (F_TTY | F_CONTROL | F_LAUNCHER | F_FDS))) {
        f->fds[0] = f->fds[1] = f->fds[2] = -1;
        f->nfds = 3; /* whatever of them was made is closed with the frame */
        if (!proc_streams(p, f->fds)) {
            failure_set(failure, "stdio", errno, 0, "stdio: %s", strerror(errno));
            return false;
        }
        flags |= F_FDS;
    }
    p->guest = guest;
    p->state = STARTING;
    guest->exercised |= !(p->flags & F_MAIN);
    if (forward(guest, rest, f, NULL, 0, p, flags))
        return true;
    failure_set(failure, "guest", EAGAIN, 0, "too much is asked of this guest");
    return false;
}

static const char *spawn_refusal(const Frame *f, int flags)
{
    Span argv;
    if (!field_find(f->body, T_ARGV, &argv) || !argv.n)
        return "ARGV is missing";
    if (flags & ~FLAGS_KNOWN || f->nfds != (flags & F_FDS ? 3 : 0) || (flags & F_FDS && flags & F_TTY) ||
        (flags & F_SERIAL && (!(flags & F_CONTROL) || flags & F_LAUNCHER)))
        return "FLAGS and descriptors do not fit";
    if (flags & F_BESIDE && (flags & ~F_BESIDE || *field_text(f->body, T_TO) || !node.keeper))
        return "what is BESIDE a guest is a keeper's, and nothing else";
    if (flags & F_APART && (!(flags & F_MAIN) || !*field_text(f->body, T_TO) ||
                            (node.keeper && *field_text(f->body, T_HOME) != '/')))
        return "what is APART is a MAIN in a guest, with a HOME";
    if (flags & F_MAIN && !(flags & F_APART) && node.main_spawned)
        return "there is a MAIN already";
    if (node.quitting)
        return "quitting";
    return NULL;
}

static void spawn_again(Peer *who, const Frame *f, Proc *p)
{
    Buf body = {0};
    if (p->unbound) {
        hush_bind(who, f, p);
        return;
    }
    if (p->state == STARTING) {
        proc_wait_start(p, who, f->id);
        return;
    }
    put_int(&body, T_PID, p->pid);
    peer_reply(who, K_OK, f->id, &body);
}

static void spawn_options(Proc *p, Peer *who, const Frame *f)
{
    int64_t number = field_int(f->body, T_STREAM, 0);
    p->serial = p->flags & F_SERIAL && !*field_text(f->body, T_TO);
    p->park_ms = p->park_wait_ms = field_int(f->body, T_PARK, 0);
    p->grace_ms = field_int(f->body, T_GRACE, 0);
    p->spoke_ms = ticks_ms();
    after_set(p, f);
    if (p->park_ms < 0 || p->park_ms > DAY_MS || !p->serial)
        p->park_ms = 0;
    if (p->grace_ms < 0 || p->grace_ms > DAY_MS)
        p->grace_ms = 0;
    if (who->kind == PEER_CONTROLLER && !who->passes_fds && number > 0 && number <= UINT32_MAX)
        serial_started_local(p, who, (uint32_t)number);
}

static bool at_home(Proc *p, const Frame *f, Failure *failure)
{
    const char *dir = field_text(f->body, T_HOME);
    if (!node.keeper || !(p->flags & F_APART) || home_open(p, dir))
        return true;
    failure_set(failure, "home", errno, 0, "\"%.200s\": %s", dir, strerror(errno));
    return false;
}

static void spawn_request(Peer *who, Frame *f)
{
    char name[MAX_NAME + 1];
    Failure failure;
    int flags = (int)field_int(f->body, T_FLAGS, 0);
    const char *to = field_text(f->body, T_TO), *refusal = spawn_refusal(f, flags);
    if (!full_name(who, f, name))
        return;
    Proc *p = proc_find(name);
    if (p && p->state != PENDING) {
        spawn_again(who, f, p);
        return;
    }
    if (!p && !(p = proc_new(name, 0))) {
        reply_error(who, f->id, "key", EAGAIN, "too many processes: forget some");
        return;
    }
    p->flags = flags;
    spawn_options(p, who, f);
    proc_wait_start(p, who, f->id);
    if (refusal)
        failure_set(&failure, "request", EINVAL, 0, "%s", refusal);
    if (refusal || !at_home(p, f, &failure) || !(*to ? spawn_remote(p, f, to, &failure) : spawn_local(p, f, &failure)))
        proc_failed(p, &failure);
}

void kill_all(int signal, bool guests)
{
    if (node.pid1) {
        kill(-1, signal);
        return;
    }
    for (Proc *p = node.procs; p; p = p->next)
        if (guests || !(p->flags & F_WORDS))
            proc_kill(p, signal, SCOPE_GROUP);
}

/* A keeper spares its guests: they are not in the environment, they hold it. */
static void signal_everything(int number)
{
    kill_all(number, !node.keeper);
    if (!node.pid1 && !launching() && signal_strays(number, false) && number == SIGKILL)
        node.sweeping = true;
}

/* A signal to a process that has ended is no error: it has what the sender wanted. */
static void signal_proc(Peer *who, const Frame *f, Proc *p, int number, int scope)
{
    Buf body = {0};
    Frame out = {.kind = K_SIGNAL};
    if (!p || p->state == PENDING) {
        no_such_key(who, f->id);
        return;
    }
    if (!p->remote || p->state >= DRAINING || !p->guest || !p->guest->control) {
        proc_kill(p, number, scope);
        reply_ok(who, f->id);
        return;
    }
    const char *rest, *last = strrchr(p->name, '/');
    char *to = request_text((Span){(const uint8_t *)p->name, (size_t)(last - p->name)});
    put_text(&body, T_KEY, last + 1);
    put_int(&body, T_SIGNAL, number);
    put_int(&body, T_SCOPE, scope);
    out.body = buf_span(&body);
    if (forward_guest(to, &rest) != p->guest || !forward(p->guest, rest, &out, who, f->id, NULL, 0))
        reply_error(who, f->id, "guest", EAGAIN, "too much is asked of this guest");
    buf_free(&body);
}

static void pass_on(Peer *who, Frame *f, const char *to)
{
    const char *rest;
    Proc *guest = forward_guest(to, &rest);
    if (!guest)
        reply_error(who, f->id, "guest", ESRCH, "no such guest is there");
    else if (guest->serial && f->nfds)
        reply_error(who, f->id, "guest", EOPNOTSUPP, "no descriptor can travel to this guest");
    else if (!forward(guest, rest, f, who, f->id, NULL, 0))
        reply_error(who, f->id, "guest", EAGAIN, "too much is asked of this guest");
}

static bool signal_fits(Peer *who, const Frame *f, int *number, int *scope)
{
    int64_t n = field_int(f->body, T_SIGNAL, -1), s = field_int(f->body, T_SCOPE, 0);
    *number = (int)n;
    *scope = (int)s;
    if (n >= 0 && n <= 64 && s >= SCOPE_PROCESS && s <= SCOPE_ALL)
        return true;
    reply_error(who, f->id, "request", EINVAL, "no such signal or scope");
    return false;
}

static void signal_request(Peer *who, Frame *f)
{
    char name[MAX_NAME + 1];
    int number, scope;
    const char *to = field_text(f->body, T_TO);
    if (!signal_fits(who, f, &number, &scope))
        return;
    if (scope == SCOPE_ALL && *to) {
        pass_on(who, f, to);
    } else if (scope == SCOPE_ALL) {
        signal_everything(number);
        reply_ok(who, f->id);
    } else if (full_name(who, f, name)) {
        signal_proc(who, f, proc_find(name), number, scope);
    }
}

/* The terminal is at the other end of a serial channel. */
static void resize_far(Peer *who, const Frame *f, Proc *p)
{
    Buf body = {0};
    Frame out = {.kind = K_RESIZE};
    put_text(&body, T_KEY, strchr(p->name, '/') + 1);
    put_int(&body, T_ROWS, field_int(f->body, T_ROWS, 0));
    put_int(&body, T_COLS, field_int(f->body, T_COLS, 0));
    out.body = buf_span(&body);
    if (!p->guest || !forward(p->guest, "", &out, who, f->id, NULL, 0))
        reply_error(who, f->id, "guest", EAGAIN, "too much is asked of this guest");
    buf_free(&body);
}

static void resize_proc(Peer *who, const Frame *f, Proc *p)
{
    int64_t rows = field_int(f->body, T_ROWS, 0), cols = field_int(f->body, T_COLS, 0);
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)cols};
    if (!p || p->state == PENDING)
        no_such_key(who, f->id);
    else if (p->state >= DRAINING)
        reply_ok(who, f->id);
    else if (p->number && !p->up)
        resize_far(who, f, p);
    else if (!(p->flags & F_TTY) || p->out[0].source.fd < 0 || ioctl(p->out[0].source.fd, TIOCSWINSZ, &size))
        reply_error(who, f->id, "request", ENOTTY, "this process has no terminal here");
    else
        reply_ok(who, f->id);
}

void client_request(Peer *c, Frame *f)
{
    int number, scope;
    if (f->nfds)
        peer_close(c);
    else if (f->kind == K_RESIZE)
        resize_proc(c, f, c->proc);
    else if (signal_fits(c, f, &number, &scope))
        signal_proc(c, f, c->proc, number, scope == SCOPE_ALL ? SCOPE_GROUP : scope); /* its own process, no other */
}

static bool is_stream_socket(int fd)
{
    int type = 0, domain = 0;
    socklen_t n = sizeof type, m = sizeof domain;
    return !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &n) && type == SOCK_STREAM &&
           !getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &m) && domain == AF_UNIX;
}

static void adopt(Peer *who, Frame *f)
{
    const char *name = field_text(f->body, T_KEY);
    if (!node.keeper || f->nfds != 1 || !is_stream_socket(f->fds[0]) || !*name || strlen(name) > MAX_NAME) {
        reply_error(who, f->id, "request", EINVAL, "ADOPT needs a name and one connected socket");
        return;
    }
    Proc *p = proc_find(name);
    if (peer_count(PEER_CLIENT) >= CLIENTS_MAX || (!p && !(p = proc_new(name, 0)))) {
        reply_error(who, f->id, "key", EAGAIN, "too many clients or processes");
        return;
    }
    int fd = move_high(f->fds[0]);
    f->fds[0] = -1;
    reply_ok(who, f->id);
    client_attach(p, fd, field_int(f->body, T_FLAGS, 0) & F_STDIN);
}

static void procs(Peer *who, const Frame *f)
{
    Buf body = {0};
    const char *prefix = field_text(f->body, T_PREFIX);
    for (Proc *p = node.procs; p; p = p->next) {
        if (p->state == PENDING || strncmp(p->name, prefix, strlen(prefix)) != 0)
            continue;
        size_t mark = put_open(&body, T_PROC);
        put_text(&body, T_KEY, p->name);
        put_int(&body, T_PID, p->pid);
        put_int(&body, T_STATE, p->state == ENDED ? 1 : p->parked == PARKED ? 2 : 0);
        put_int(&body, T_CODE, p->state == ENDED ? p->code : 0);
        put_int(&body, T_SIGNAL, p->state == ENDED ? p->signal : 0);
        put_int(&body, T_TIME, p->started_ns);
        put_int(&body, T_TIME, p->state == ENDED ? p->ended_ns : 0);
        put_close(&body, mark);
    }
    peer_reply(who, K_OK, f->id, &body);
}

static void forget(Peer *who, Frame *f)
{
    char name[MAX_NAME + 1];
    const char *rest, *to = field_text(f->body, T_TO);
    if (!full_name(who, f, name))
        return;
    Proc *p = proc_find(name);
    Proc *guest = *to ? forward_guest(to, &rest) : NULL;
    if (p && p->state != ENDED && p->state != PENDING) {
        reply_error(who, f->id, "key", EBUSY, "this process has not ended");
        return;
    }
    if (p)
        proc_drop(p);
    if (!guest || !forward(guest, rest, f, who, f->id, NULL, 0))
        reply_ok(who, f->id);
}

static void machine(Peer *who, Frame *f)
{
    Buf body = {0};
    if (node.on_machine && f->kind == K_IDLE && node_busy()) { /* it would be stopped with its words on their way */
        put_int(&body, T_COUNT, 0);
        peer_reply(who, K_OK, f->id, &body);
    } else if (!node.on_machine || !node.on_machine(who, f))
        reply_error(who, f->id, "request", ENOSYS, "this is no machine");
}

static void serve(Peer *who, Frame *f)
{
    const char *to = field_text(f->body, T_TO);
    switch (f->kind) {
    case K_HELLO: hello(who, f); break;
    case K_STEP: *to ? pass_on(who, f, to) : step(who, f); break;
    case K_READ: *to ? pass_on(who, f, to) : file_read(who, f); break;
    case K_WRITE: *to ? pass_on(who, f, to) : file_write(who, f); break;
    case K_SPAWN: spawn_request(who, f); break;
    case K_SIGNAL: signal_request(who, f); break;
    case K_RESIZE: resize_proc(who, f, proc_find(field_text(f->body, T_KEY))); break;
    case K_ADOPT: adopt(who, f); break;
    case K_PROCS: procs(who, f); break;
    case K_FORGET: forget(who, f); break;
    case K_QUIT: node_quit(who, f->id); break;
    case K_HOLD: hold(who, f); break;
    case K_FETCH: fetch(who, f); break;
    case K_DROP: drop(who, f); break;
    case K_RESUME:
    case K_SETTLE:
    case K_IDLE: *to ? pass_on(who, f, to) : machine(who, f); break;
    case K_HUSH: *to ? hush_guest(who, f, to) : hush_self(who, f); break;
    default: reply_error(who, f->id, "request", ENOSYS, "unknown kind of request"); break;
    }
}

void request_handle(Peer *who, Frame *f)
{
    if (f->kind == K_HELLO && !who->passes_fds) /* before anything is said: it is not for this host */
        hush_new_host(who);
    peer_speak(who);
    if (f->id && wire_raw(f->kind) && !who->passes_fds)
        serial_from_controller(who, f);
    else if (!f->id || f->kind >= K_OK) /* every request has a number; replies and streams are none */
        peer_close(who);
    else
        serve(who, f);
}
