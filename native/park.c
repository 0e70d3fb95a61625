/* A machine in which nothing happens by itself for long is stopped, and woken before the next word to it, or when the
first thing will.

The guest's agent knows: it is asked when nobody has said anything for a while. A stopped machine costs memory and
nothing else; SIGCONT and its first answer take milliseconds, because all that it had translated is still there. */
#include "node.h"

#include <signal.h>

/* Numbers that no forwarded request has. One for each question, or a late answer would be taken for the next one's. */
enum { PARK_IDS = 0x7fff0000, PARK_IDS_MASK = 0xffff, PARK_WAIT_FACTOR = 16, PARK_WORTH_FACTOR = 360 };

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

/* Until something in it runs by itself; -1: never. For less than an hour, with the ten seconds that are usual, it is not
   worth it: to be woken costs more than to tick. */
static bool worth_it(const Proc *g, int64_t left_ms)
{
    return left_ms == -1 || left_ms >= g->park_ms * PARK_WORTH_FACTOR;
}

bool park_answer(Proc *g, const Frame *f)
{
    if (f->id < PARK_IDS || f->nfds || (f->kind != K_OK && f->kind != K_ERROR))
        return false;
    if (g->parked != ASKED || f->id != g->asked)
        return true; /* somebody has said something meanwhile */
    int64_t left_ms = f->kind == K_OK ? field_int(f->body, T_COUNT, 0) : 0;
    if (worth_it(g, left_ms) && left_ms < INT64_MAX / 2 && !kill(g->pid, SIGSTOP)) {
        g->parked = PARKED;
        g->wake_ms = left_ms < 0 ? 0 : ticks_ms() + left_ms;
        g->exercised = true;
        return true;
    }
    g->parked = AWAKE;
    g->spoke_ms = ticks_ms();
    if (g->park_wait_ms < g->park_ms * PARK_WAIT_FACTOR)
        g->park_wait_ms *= 2;
    return true;
}

/* When it is to be asked, or woken; 0: neither. */
static int64_t due_ms(const Proc *g)
{
    if (!parks(g) || g->state != ALIVE || g->parked == ASKED)
        return 0;
    return g->parked == PARKED ? g->wake_ms : g->spoke_ms + g->park_wait_ms;
}

void park_tick(int64_t now_ms, int *timeout_ms)
{
    for (Proc *g = node.procs; g; g = g->next) {
        int64_t due = due_ms(g), left = due - now_ms;
        if (!due)
            continue;
        if (left <= 0 && g->parked == PARKED)
            park_spoke(g);
        else if (left <= 0)
            ask(g);
        left = due_ms(g) - now_ms;
        if (due_ms(g) && (*timeout_ms < 0 || left < *timeout_ms))
            *timeout_ms = left < INT32_MAX ? (int)left : INT32_MAX;
    }
}
