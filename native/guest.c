/* The channel to what was spawned with CONTROL. It is hostile: it may answer what we asked, and nothing else. */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

static void guest_frame(Peer *peer, Frame *f);
static void guest_gone(Peer *peer);

static void guest_drained(Peer *peer) { serial_drained(peer); }

static const PeerOps guest_ops = {guest_frame, guest_gone, guest_drained};

void guest_open(Proc *p, int fd)
{
    p->control = peer_new(fd, PEER_GUEST, &guest_ops);
    p->control->proc = p;
    if (p->serial) {
        p->control->passes_fds = false;
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); /* it is read and written like a file */
    }
}

void guest_send(Proc *g, Frame *f)
{
    if (!g->control)
        return;
    park_spoke(g);
    peer_send(g->control, f);
}

void guest_kill(Proc *p) { proc_kill(p, SIGKILL, SCOPE_PROCESS); }

static bool is_own_guest(const Proc *p)
{
    return p->flags & F_CONTROL && !p->remote && (p->state == ALIVE || p->state == STARTING);
}

/* A guest does not go on without what is beside it: what waits inside for an answer of that would wait for ever. One
   that ended with 0 has seen the guest's own end. */
void guest_lost_beside(const Proc *p)
{
    char line[MAX_NAME + 64];
    bool told = p->code && !node.main_ended;
    int n = snprintf(line, sizeof line, "\nisolat-keeper: %s ended with %s %d\n", p->name, p->signal ? "signal" : "code",
                     p->signal ? p->signal : p->code);
    for (Proc *g = node.procs; g; g = g->next) {
        if (!is_own_guest(g))
            continue;
        if (told && p->tail)
            stream_words(g, p->tail, p->tail_len);
        if (told)
            stream_words(g, line, (size_t)n);
        guest_kill(g);
    }
}

static void end_beside(void)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (p->flags & F_BESIDE)
            proc_kill(p, SIGKILL, SCOPE_PROCESS);
}

void guest_leave(Proc *p)
{
    if (p->grace_ms)
        p->kill_by_ms = ticks_ms() + p->grace_ms;
    else
        guest_kill(p);
}

/* No way to it any more: it must not go on without us, unless it is on its way to its end. What it held is settled
   when it has been reaped. */
static void guest_gone(Peer *peer)
{
    Proc *g = peer->proc;
    if (!g)
        return;
    g->control = NULL;
    if (g->pid > 0 && !g->kill_by_ms)
        guest_kill(g);
}

static bool greet(Proc *g, const Frame *f)
{
    if (g->greeted || f->id || f->nfds || field_int(f->body, T_VERSION, 0) != WIRE_VERSION)
        return false;
    g->greeted = true;
    proc_check_start(g);
    return true;
}

static bool within(int64_t v, int max) { return v >= 0 && v <= max; }

static bool guest_exited(Proc *g, const Frame *f)
{
    char name[MAX_NAME + 1];
    int64_t code = field_int(f->body, T_CODE, -1), signal = field_int(f->body, T_SIGNAL, 0);
    const char *key = field_text(f->body, T_KEY);
    if (snprintf(name, sizeof name, "%s/%s", g->name, key) >= (int)sizeof name)
        return false;
    Proc *p = proc_find(name);
    if (!p || !p->remote || p->guest != g || p->state != ALIVE || f->nfds || !within(code, 255) || !within(signal, 64))
        return false;
    p->with_guest = !strcmp(field_text(f->body, T_STAGE), "guest");
    p->oom = (p->flags & (F_MAIN | F_APART)) == F_MAIN && !strcmp(field_text(f->body, T_OPTIONS), "oom");
    proc_exited(p, (int)code, (int)signal);
    return true;
}

static bool serial_says(Proc *g, Frame *f)
{
    if (!g->greeted)
        return serial_greet(g, f);
    if (park_answer(g, f))
        return true;
    park_spoke(g);
    if (wire_raw(f->kind))
        return serial_from_guest(g, f);
    if (f->kind == K_OK || f->kind == K_ERROR)
        return forward_reply(g, f);
    return f->kind == K_EXITED && guest_exited(g, f);
}

static bool guest_says(Proc *g, Frame *f)
{
    if (g->serial)
        return serial_says(g, f);
    if (f->kind == K_HELLO)
        return greet(g, f);
    if (!g->greeted)
        return false;
    if (f->kind == K_OK || f->kind == K_ERROR)
        return forward_reply(g, f);
    return f->kind == K_EXITED && guest_exited(g, f);
}

static void guest_frame(Peer *peer, Frame *f)
{
    Proc *g = peer->proc;
    if (g && !guest_says(g, f) && !peer->gone)
        peer_close(peer);
}

/* It has been reaped. What it said before still counts: its last EXITED may be in the socket. */
void guest_ended(Proc *g)
{
    Failure f;
    for (int i = 0; i < 4096 && g->control && peer_read(g->control); i++)
        ;
    stream_drain(g); /* its last words */
    if (node.keeper && g->tail_len)
        log_tail(g->tail, g->tail_len);
    if (g->control)
        peer_close(g->control);
    forward_guest_gone(g);
    for (Proc *p = node.procs; p; p = p->next) {
        if (!p->name || p->guest != g)
            continue;
        p->guest = NULL;
        if (p->state == STARTING) {
            failure_set(&f, "guest", ESRCH, 0, "the guest ended");
            proc_failed(p, &f);
        } else if (p->state == ALIVE) {
            p->with_guest = !p->after_pid; /* else it had ended before: what follows on that has ended its guest */
            proc_exited(p, 128 + SIGKILL, SIGKILL);
        }
    }
    end_beside();
    if (node.keeper)
        kill_strays();
}
