/* Streams on a channel without descriptors: DATA, EOF and CREDIT carry the number of a process.

   Each direction of each stream begins with SERIAL_CREDIT; more is given for what has been written. The agent keeps
   SERIAL_RESERVE of it for what a process wrote before its end, so an end never waits for a slow reader. The side that
   trusts less (the keeper) closes the channel on any breach; the agent ignores what makes no sense. */
#include "node.h"

#include <string.h>

enum { HELLO_ID = 0x7fffffff };

static uint32_t last_number;

static void credit_all(size_t credit[3])
{
    for (int i = 0; i < 3; i++)
        credit[i] = SERIAL_CREDIT;
}

void serial_open_guest(Proc *g)
{
    Buf body = {0};
    Frame f = {.kind = K_HELLO, .id = HELLO_ID};
    put_int(&body, T_VERSION, WIRE_VERSION);
    put_text(&body, T_ROLE, node.role);
    f.body = buf_span(&body);
    guest_send(g, &f);
    buf_free(&body);
}

bool serial_greet(Proc *g, const Frame *f)
{
    if (f->kind != K_OK || f->id != HELLO_ID || f->nfds || field_int(f->body, T_VERSION, 0) != WIRE_VERSION ||
        strcmp(field_text(f->body, T_ROLE), "agent") != 0)
        return false;
    g->greeted = true;
    proc_check_start(g);
    return true;
}

void serial_started_remote(Proc *p)
{
    p->number = ++last_number ? last_number : ++last_number;
    credit_all(p->may_send);
    credit_all(p->may_come);
}

void serial_started_local(Proc *p, Peer *up, uint32_t number)
{
    p->number = number;
    p->up = up->serial;
    p->input_closed = !(p->flags & F_STDIN);
    p->foreign = buf_size(&p->leftover);
    memset(p->owed, 0, sizeof p->owed);
    credit_all(p->may_send);
    credit_all(p->may_come);
}

static Proc *by_number(const Proc *guest, uint32_t up, uint32_t number)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (number && p->name && p->number == number && p->up == up && (up || p->guest == guest) && p->state != ENDED)
            return p;
    return NULL;
}

static void send(Proc *p, uint8_t kind, const uint8_t *body, size_t n)
{
    Frame f = {.kind = kind, .id = p->number, .body = {body, n}};
    Peer *up = p->up ? peer_by_serial(p->up) : NULL;
    if (up)
        peer_send(up, &f);
    else if (!p->up && p->guest)
        guest_send(p->guest, &f);
}

static void give_credit(Proc *p, int stream)
{
    uint8_t body[5] = {(uint8_t)stream};
    put_u32(body + 1, (uint32_t)p->owed[stream]);
    p->may_come[stream] += p->owed[stream];
    p->owed[stream] = 0;
    send(p, K_CREDIT, body, sizeof body);
}

/* A body in form: its stream, and for CREDIT the amount. */
static bool parse(const Frame *f, int *stream, uint32_t *credit)
{
    if (!f->body.n || f->nfds || (*stream = f->body.p[0]) > 2)
        return false;
    if (f->kind == K_CREDIT && f->body.n == 5)
        *credit = get_u32(f->body.p + 1);
    return f->kind == K_CREDIT ? f->body.n == 5 && *credit <= SERIAL_CREDIT
         : f->kind == K_DATA   ? f->body.n > 1 && f->body.n <= MAX_DATA + 1
                               : f->kind == K_EOF && f->body.n == 1;
}

/* the keeper's side */

static bool open_output(const Proc *p, int stream)
{
    return stream && !(p->ended_streams & 1 << stream) && !(stream == 2 && p->flags & F_TTY);
}

static bool take_output(Proc *p, int stream, const Frame *f)
{
    size_t n = f->body.n - 1, cost = n + SERIAL_FRAME;
    if (!open_output(p, stream) || cost > p->may_come[stream])
        return false;
    p->may_come[stream] -= cost;
    p->owed[stream] += cost;
    stream_deliver(p, stream, f->body.p + 1, n);
    serial_acknowledge(p);
    return true;
}

bool serial_from_guest(Proc *g, const Frame *f)
{
    int stream;
    uint32_t credit = 0;
    Proc *p = by_number(g, 0, f->id);
    if (!parse(f, &stream, &credit) || !p || (p->state != STARTING && p->state != ALIVE)) /* it may write before OK is here */
        return false;
    if (f->kind == K_DATA)
        return take_output(p, stream, f);
    if (f->kind == K_CREDIT) {
        if (stream || p->may_send[0] + credit > SERIAL_CREDIT)
            return false;
        p->may_send[0] += credit;
        stream_write(p);
        return true;
    }
    if (stream && !open_output(p, stream))
        return false;
    if (stream) {
        stream_told_eof(p, stream);
    } else { /* it has closed its stdin */
        p->input_closed = true;
        stream_discard(p);
    }
    return true;
}

void serial_acknowledge(Proc *p)
{
    for (int i = 1; i < 3 && !stream_held_back(p); i++)
        if (p->owed[i] >= SERIAL_BATCH)
            give_credit(p, i);
}

bool serial_input(Proc *p, Span data, size_t *taken)
{
    static uint8_t body[1 + MAX_DATA];
    Peer *channel = p->guest ? p->guest->control : NULL;
    size_t n = data.n < MAX_DATA ? data.n : MAX_DATA;
    if (p->may_send[0] <= SERIAL_FRAME || !channel || channel->queued > CHANNEL_FULL)
        return false;
    if (n > p->may_send[0] - SERIAL_FRAME)
        n = p->may_send[0] - SERIAL_FRAME;
    body[0] = 0;
    memcpy(body + 1, data.p, n);
    p->may_send[0] -= n + SERIAL_FRAME;
    send(p, K_DATA, body, n + 1);
    *taken = n;
    return true;
}

void serial_input_eof(Proc *p)
{
    uint8_t body[1] = {0};
    p->input_closed = true;
    send(p, K_EOF, body, 1);
}

/* All its output has come before this. */
void serial_ended(Proc *p)
{
    for (int i = 1; i < (p->flags & F_TTY ? 2 : 3); i++)
        if (!(p->ended_streams & 1 << i))
            stream_told_eof(p, i);
    p->input_closed = true;
    stream_discard(p);
}

/* the agent's side */

static void more_room(Proc *p)
{
    if (p->state == DRAINING) {
        stream_drain(p);
        proc_finish(p);
    } else {
        stream_watch(p);
    }
}

static void take_input(Proc *p, const Frame *f)
{
    size_t n = f->body.n - 1;
    if (n + SERIAL_FRAME > p->may_come[0] || p->stdin_eof)
        return;
    p->may_come[0] -= n + SERIAL_FRAME;
    p->owed[0] += SERIAL_FRAME;
    if (p->input_closed)
        serial_written(p, n);
    else
        buf_add(&p->leftover, f->body.p + 1, n);
    stream_write(p);
}

void serial_from_controller(Peer *up, const Frame *f)
{
    int stream;
    uint32_t credit = 0;
    Proc *p = by_number(NULL, up->serial, f->id);
    if (!p || !parse(f, &stream, &credit))
        return;
    if (f->kind == K_CREDIT && stream && p->may_send[stream] + credit <= SERIAL_CREDIT) {
        p->may_send[stream] += credit;
        more_room(p);
    } else if (f->kind == K_DATA && !stream) {
        take_input(p, f);
    } else if (f->kind == K_EOF && !stream) {
        p->stdin_eof = true;
        stream_write(p);
    }
}

bool serial_full(const Proc *p)
{
    const Peer *up = peer_by_serial(p->up);
    return up && (up->queued > CHANNEL_FULL || up->hushed);
}

size_t serial_room(const Proc *p, int stream)
{
    size_t kept = SERIAL_FRAME + (p->state == DRAINING ? 0 : SERIAL_RESERVE);
    if (!peer_by_serial(p->up))
        return MAX_DATA; /* nobody will ever read it: the process must not hang on that */
    if (p->may_send[stream] <= kept || serial_full(p))
        return 0;
    size_t room = p->may_send[stream] - kept;
    return room < MAX_DATA ? room : MAX_DATA;
}

/* `data` has a free byte before it. */
void serial_deliver(Proc *p, int stream, const uint8_t *data, size_t n)
{
    uint8_t *body = (uint8_t *)data - 1;
    body[0] = (uint8_t)stream;
    size_t cost = n + SERIAL_FRAME;
    p->may_send[stream] -= cost < p->may_send[stream] ? cost : p->may_send[stream];
    send(p, K_DATA, body, n + 1);
}

void serial_eof(Proc *p, int stream)
{
    uint8_t body[1] = {(uint8_t)stream};
    send(p, K_EOF, body, 1);
}

void serial_written(Proc *p, size_t n)
{
    size_t foreign = n < p->foreign ? n : p->foreign;
    p->foreign -= foreign;
    p->owed[0] += n - foreign;
    if (p->owed[0] >= SERIAL_BATCH || (p->owed[0] && !buf_size(&p->leftover)))
        give_credit(p, 0);
}

/* both */

void serial_drained(const Peer *channel)
{
    for (Proc *p = node.procs; p; p = p->next) {
        if (!p->name || !p->number || p->state < ALIVE)
            continue;
        if (p->up == channel->serial)
            more_room(p);
        else if (p->guest && p->guest->control == channel)
            stream_write(p);
    }
}
