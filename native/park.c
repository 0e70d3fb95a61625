/* A machine in which nothing happens by itself is stopped, and woken before the next word to it.

The guest's agent knows: it is asked when nobody has said anything for a while. A stopped machine costs memory and
nothing else; SIGCONT and its first answer take milliseconds, because all that it had translated is still there. */
#include "node.h"

#include <signal.h>

/* Numbers that no forwarded request has. One for each question, or a late answer would be taken for the next one's. */
enum { PARK_IDS = 0x7fff0000, PARK_IDS_MASK = 0xffff, PARK_WAIT_FACTOR = 16 };

/* Not while it has its grace: it was told to end. Nor while it is silent: it could not answer. */
static bool parks(const Proc *g)
{
    return g->name && g->park_ms && g->control && g->greeted && g->pid > 0 && !g->kill_by_ms &&
           !hushed(g);
}

void park_woken(Proc *g)
{
    g->parked = AWAKE;
    g->spoke_ms = ticks_ms();
    g->park_wait_ms = g->park_ms;
}

void park_spoke(Proc *g)
{
    if (!g->park_ms)
        return;
    if (g->parked == PARKED)
        kill(g->pid, SIGCONT);
    park_woken(g);
}

static void ask(Proc *g)
{
    g->asked = PARK_IDS | ((g->asked + 1) & (PARK_IDS_MASK >> 1));
    Frame f = {.kind = K_IDLE, .id = g->asked};
    Buf body = {0};
    if (!g->exercised)
        put_int(&body, T_OP, 1);
    f.body = buf_span(&body);
    g->parked = ASKED;
    peer_send(g->control, &f);
    buf_free(&body);
}

bool park_answer(Proc *g, const Frame *f)
{
    if (f->id < PARK_IDS || f->nfds || (f->kind != K_OK && f->kind != K_ERROR))
        return false;
    if (g->parked != ASKED || f->id != g->asked)
        return true; /* somebody has said something meanwhile */
    if (f->kind == K_OK && field_int(f->body, T_COUNT, 0) == -1 && !kill(g->pid, SIGSTOP)) {
        g->parked = PARKED;
        g->exercised = true;
        return true;
    }
    g->parked = AWAKE;
    g->spoke_ms = ticks_ms();
    if (g->park_wait_ms < g->park_ms * PARK_WAIT_FACTOR)
        g->park_wait_ms *= 2;
    return true;
}

void park_tick(int64_t now_ms, int *timeout_ms)
{
    for (Proc *g = node.procs; g; g = g->next) {
        if (!parks(g) || g->state != ALIVE || g->parked != AWAKE)
            continue;
        int64_t left = g->spoke_ms + g->park_wait_ms - now_ms;
        if (left <= 0)
            ask(g);
        else if (*timeout_ms < 0 || left < *timeout_ms)
            *timeout_ms = left < INT32_MAX ? (int)left : INT32_MAX;
    }
}
