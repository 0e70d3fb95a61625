/* Silence on a serial channel while a machine is copied: what is on its way at that moment would be said twice, by the
   machine and by its copy, or come to the copy's host without its beginning.

   HUSH with OP 0 goes through the channel like every request. The keeper sends nothing after it and does not park the
   machine; the agent says nothing after its OK, which so proves that all before it has come. Processes go on and their
   pipes fill up. HUSH with OP 1, or the end of the controller that asked, ends it: any frame lets the agent speak.

   The copy's host is new, which its HELLO tells: nothing that was meant for another host is said to it, and the
   processes go on without one until a SPAWN with their key binds them to it. */
#include "node.h"

#include <errno.h>

enum { SPEAK_ID = 0x7ffffffe }; /* a number of our own, whose answer nobody reads (park_answer) */

/* the keeper's side */

bool hushed(const Proc *g) { return g->control && g->control->hushed; }

static void speak(Proc *g)
{
    Buf body = {0};
    Frame f = {.kind = K_HUSH, .id = SPEAK_ID};
    g->hushed_by = 0;
    if (!hushed(g))
        return;
    peer_speak(g->control);
    put_int(&body, T_OP, 1);
    f.body = buf_span(&body);
    guest_send(g, &f);
    buf_free(&body);
}

static const char *refusal(const Proc *g, const char *rest, const Peer *who, bool silent)
{
    if (!g || !g->serial || *rest)
        return "no machine is there";
    if (!g->greeted)
        return "the machine has not come to life";
    return silent && hushed(g) && g->hushed_by != who->serial ? "another controller keeps it silent" : NULL;
}

void hush_guest(Peer *who, const Frame *f, const char *to)
{
    const char *rest = "";
    Proc *g = forward_guest(to, &rest);
    bool silent = field_int(f->body, T_OP, 0) == 0;
    const char *why = refusal(g, rest, who, silent);
    if (why) {
        reply_error(who, f->id, "guest", EOPNOTSUPP, why);
        return;
    }
    if (hushed(g))
        peer_speak(g->control);
    if (!forward(g, rest, f, who, f->id, NULL, 0)) {
        reply_error(who, f->id, "guest", EAGAIN, "too much is asked of this guest");
        return;
    }
    g->hushed_by = silent ? who->serial : 0;
    if (silent)
        peer_hush(g->control);
}

void hush_controller_gone(const Peer *who)
{
    for (Proc *g = node.procs; g; g = g->next)
        if (g->name && g->hushed_by == who->serial)
            speak(g);
}

/* the agent's side */

void hush_self(Peer *who, const Frame *f)
{
    bool silent = field_int(f->body, T_OP, 0) == 0;
    if (who->kind != PEER_CONTROLLER || who->passes_fds || !node.holds || node.keeper) {
        reply_error(who, f->id, "request", ENOSYS, "this is no machine");
        return;
    }
    reply_ok(who, f->id);
    if (silent)
        peer_hush(who);
}

static void unbind(Proc *p)
{
    p->unbound = true;
    p->up = p->number = 0;
    p->nwaiters = 0; /* their requests were another host's */
    p->deadline_ms = 0;
    if (p->state == DRAINING) {
        stream_drain(p);
        stream_close(p);
        proc_finish(p);
    } else {
        stream_watch(p);
    }
}

void hush_new_host(Peer *who)
{
    peer_forget(who);
    for (Proc *p = node.procs; p; p = p->next)
        if (p->name)
            unbind(p);
}

static void tell_ended_streams(Proc *p)
{
    for (int i = 1; i < 3; i++)
        if (p->ended_streams & 1 << i)
            serial_eof(p, i);
    if (p->in.source.fd < 0 && p->flags & F_STDIN) {
        p->input_closed = true;
        serial_eof(p, 0);
    }
}

static void tell_exit(Peer *who, const Proc *p)
{
    Buf body = {0};
    proc_put_exit(&body, p);
    peer_reply(who, K_EXITED, 0, &body);
}

void hush_bind(Peer *who, const Frame *f, Proc *p)
{
    int64_t number = field_int(f->body, T_STREAM, 0);
    Buf body = {0};
    p->unbound = false;
    if (number > 0 && number <= UINT32_MAX)
        serial_started_local(p, who, (uint32_t)number);
    if (p->state == STARTING) {
        proc_wait_start(p, who, f->id);
        return;
    }
    put_int(&body, T_PID, p->pid);
    peer_reply(who, K_OK, f->id, &body);
    if (p->state == ENDED) {
        tell_exit(who, p);
        return;
    }
    tell_ended_streams(p);
    stream_watch(p);
}
