/* Requests with TO go to a guest with the first key taken off; its reply finds its asker by our own number. */
#include "node.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { FORWARDS_MAX = 256, LAST_ID = 0x7ffe0000 }; /* above: numbers of our own questions */

typedef struct Forward {
    struct Forward *next;
    uint32_t id;
    Proc *guest;
    Waiter asker;
    Proc *spawned; /* of a SPAWN, whose askers wait at the process */
} Forward;

static Forward *forwards;
static int nforwards;
static uint32_t last_id;

Proc *forward_guest(const char *to, const char **rest)
{
    char first[MAX_NAME + 1];
    size_t n = strcspn(to, "/");
    if (n > MAX_NAME)
        return NULL;
    memcpy(first, to, n);
    first[n] = 0;
    *rest = to[n] ? to + n + 1 : "";
    Proc *g = proc_find(first);
    return g && g->control && g->state == ALIVE ? g : NULL;
}

static void rebuild(Buf *b, Span body, const char *rest, const Proc *spawned, int flags)
{
    uint8_t tag;
    Span value;
    while (field_next(&body, &tag, &value))
        if (tag != T_TO && !(spawned && (tag == T_FLAGS || tag == T_STREAM || tag == T_HOME || (tag == T_INVERSE && node.after))))
            put_bytes(b, tag, value.p, value.n);
    if (*rest)
        put_text(b, T_TO, rest);
    if (spawned)
        put_int(b, T_FLAGS, flags);
    if (spawned && spawned->number && !spawned->up)
        put_int(b, T_STREAM, spawned->number);
}

static void remember(Proc *guest, Peer *who, uint32_t id, Proc *spawned)
{
    Forward *w = xalloc(sizeof *w);
    last_id = last_id < LAST_ID ? last_id + 1 : 1;
    w->id = last_id;
    w->guest = guest;
    w->asker = (Waiter){who ? who->serial : 0, id};
    w->spawned = spawned;
    w->next = forwards;
    forwards = w;
    nforwards++;
}

/* A guest is ended when more is queued for it than QUEUE_MAX. Requests leave room for credit and streams. */
static bool has_room(const Proc *guest, size_t n)
{
    return guest->control && guest->control->queued + n <= QUEUE_MAX - CHANNEL_FULL;
}

bool forward(Proc *guest, const char *rest, const Frame *f, Peer *who, uint32_t id, Proc *spawned, int flags)
{
    Buf body = {0};
    if (nforwards >= FORWARDS_MAX)
        return false;
    rebuild(&body, f->body, rest, spawned, flags);
    if (buf_size(&body) > MAX_BODY || !has_room(guest, buf_size(&body))) {
        buf_free(&body);
        return false;
    }
    remember(guest, who, id, spawned);
    Frame out = *f;
    out.id = last_id;
    out.body = buf_span(&body);
    guest_send(guest, &out);
    buf_free(&body);
    return true;
}

static bool spawn_reply(Proc *p, Frame *f)
{
    Failure failure;
    bool wanted = f->kind == K_OK && p->flags & F_TTY && !(p->flags & F_CONTROL) && !p->guest->serial;
    int64_t pid = field_int(f->body, T_PID, 0);
    if (f->nfds != (wanted ? 1 : 0))
        return false;
    if (f->kind == K_ERROR) {
        Buf body = {0};
        buf_add(&body, f->body.p, f->body.n);
        proc_refused(p, &body);
        buf_free(&body);
        return true;
    }
    p->pid = pid > 0 && pid < INT32_MAX ? (pid_t)pid : 0;
    if (wanted) {
        int fd = f->fds[0];
        f->fds[0] = -1;
        if (!node.holds) {
            p->master = fd;
        } else if (!stream_set_master(p, fd)) {
            failure_set(&failure, "guest", ENOTTY, 0, "what the guest sent is no terminal");
            proc_failed(p, &failure);
            return false;
        }
    }
    proc_started(p);
    return true;
}

static Forward *take(uint32_t id, const Proc *guest)
{
    for (Forward **at = &forwards; *at; at = &(*at)->next) {
        Forward *w = *at;
        if (w->guest != guest || (id && w->id != id))
            continue;
        *at = w->next;
        nforwards--;
        return w;
    }
    return NULL;
}

bool forward_reply(Proc *guest, Frame *f)
{
    Forward *w = f->id ? take(f->id, guest) : NULL;
    if (!w)
        return false;
    Forward was = *w;
    free(w);
    if (was.spawned)
        return spawn_reply(was.spawned, f);
    if (f->nfds)
        return false;
    Peer *who = peer_by_serial(was.asker.peer);
    Frame out = *f;
    out.id = was.asker.id;
    if (who && out.id)
        peer_send(who, &out);
    return true;
}

void forward_guest_gone(Proc *guest)
{
    Forward *w;
    while ((w = take(0, guest))) {
        Peer *who = w->spawned ? NULL : peer_by_serial(w->asker.peer);
        if (who && w->asker.id)
            reply_error(who, w->asker.id, "guest", ESRCH, "the guest ended");
        free(w);
    }
}
