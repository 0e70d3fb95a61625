/* Descriptors kept by name: for a process that is to get them, and for the next daemon. */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    char name[32];
    int fd;
} Held;

static Held held[HELD_MAX];

static Held *find(const char *name)
{
    for (int i = 0; i < HELD_MAX; i++)
        if (held[i].name[0] && !strcmp(held[i].name, name))
            return &held[i];
    return NULL;
}

static Held *room(const char *name)
{
    Held *h = find(name);
    for (int i = 0; !h && i < HELD_MAX; i++)
        if (!held[i].name[0])
            h = &held[i];
    return h;
}

static int rooms(void)
{
    int n = 0;
    for (int i = 0; i < HELD_MAX; i++)
        n += !held[i].name[0];
    return n;
}

int held_fd(const char *name)
{
    Held *h = find(name);
    return h ? h->fd : -1;
}

static bool keep(const char *name, int *fd)
{
    Held *h = room(name);
    int high = move_high(*fd);
    if (high < 0)
        return false;
    *fd = -1;
    if (h->name[0])
        close(h->fd);
    strcpy(h->name, name);
    h->fd = high;
    return true;
}

static bool are_names(char **names)
{
    for (char **n = names; *n; n++) {
        if (!**n || strlen(*n) >= sizeof held[0].name)
            return false;
        for (char **m = names; m < n; m++)
            if (!strcmp(*m, *n))
                return false;
    }
    return true;
}

static int new_among(char **names)
{
    int n = 0;
    for (; *names; names++)
        n += !find(*names);
    return n;
}

void hold(Peer *who, Frame *f)
{
    char **names = field_list(f->body, T_KEY);
    int n = 0;
    while (names[n])
        n++;
    if (!node.keeper || !n || n != f->nfds || !are_names(names)) {
        reply_error(who, f->id, "request", EINVAL, "HOLD needs names and as many descriptors, at a keeper");
        return;
    }
    if (new_among(names) > rooms()) {
        reply_error(who, f->id, "key", ENOSPC, "no more descriptors can be held");
        return;
    }
    for (int i = 0; i < n; i++)
        if (!keep(names[i], &f->fds[i])) {
            reply_error(who, f->id, "key", errno, "this descriptor can't be held");
            return;
        }
    reply_ok(who, f->id);
}

void fetch(Peer *who, const Frame *f)
{
    int fd = held_fd(field_text(f->body, T_KEY));
    Frame out = {.kind = K_OK, .id = f->id, .nfds = 1, .fds = {fd}};
    if (fd < 0) {
        reply_error(who, f->id, "key", ENOENT, "no descriptor of this name is held");
        return;
    }
    for (Proc *g = node.procs; g; g = g->next) /* whoever wants something of a machine wants it awake */
        if (g->name && g->serial && g->state == ALIVE)
            park_spoke(g);
    peer_send(who, &out);
}

void drop(Peer *who, const Frame *f)
{
    for (char **name = field_list(f->body, T_KEY); *name; name++) {
        Held *h = find(*name);
        if (!h)
            continue;
        close(h->fd);
        h->name[0] = 0;
    }
    reply_ok(who, f->id);
}
