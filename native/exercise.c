/* Before a machine is parked for the first time it starts a program once, as it will when somebody wants one: under
   emulation the way there is slow the first time, because its code is translated just then, and who wakes a machine
   should not have to wait for that.

   The program is our own and does nothing. It is started where the application was, at the lowest priority, only while
   everything waits, and it is killed when it takes too long. Nothing of it is told, written or kept. */
#include "machine.h"

#include <stdlib.h>
#include <string.h>

enum { EXERCISE_MS = 5000 };

static const char name[] = ".exercise";
static char *root, *group; /* of the first application */
static Waiter asker;       /* waits for its end */

void exercise_learn(const Command *c)
{
    if (root || !*c->root || !c->cgroups || !c->cgroups[0] || c->cgroups[1])
        return;
    root = strdup(c->root);
    group = strdup(c->cgroups[0]);
}

static bool begin(void)
{
    static char program[] = "/proc/self/exe", how[] = "--nothing";
    char *argv[] = {program, how, NULL}, *groups[] = {group, NULL}, *env[] = {NULL};
    Command c = {.argv = argv, .env = env, .cgroups = groups, .cwd = "", .user = "", .root = root};
    Failure f;
    memset(c.fds, -1, sizeof c.fds);
    c.orphan_dies = c.lowest_priority = true;
    Proc *p = proc_find(name) ? NULL : proc_new(name, 0);
    if (!p)
        return false;
    p->unbound = true; /* nobody hears of it */
    p->kill_by_ms = ticks_ms() + EXERCISE_MS;
    if (proc_spawn(p, &c, 0, 0, &f))
        return true;
    proc_drop(p);
    return false;
}

bool exercise(Peer *who, uint32_t id)
{
    if (!root || asker.id || !begin())
        return false;
    asker = (Waiter){who->serial, id};
    return true;
}

void exercise_turn(void)
{
    Proc *p = asker.id ? proc_find(name) : NULL;
    if (!asker.id || (p && p->state != ENDED))
        return;
    if (p)
        proc_drop(p);
    Peer *who = peer_by_serial(asker.peer);
    if (who)
        idle_answer(who, asker.id);
    asker.id = 0;
}
