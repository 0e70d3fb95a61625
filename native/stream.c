/* Output: from a pipe or a pty's master to the log and to every client. Input: from clients, by credit. */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { LEFTOVER_MAX = 1 << 20, DRAIN_MAX = 1 << 20, PTY_BYTES = 256 << 10 };

static uint8_t scratch[1 + MAX_DATA]; /* the body of a DATA frame */

static void output_ready(Source *s, uint32_t events);
static void input_ready(Source *s, uint32_t events);
static void client_gone(Peer *c);
static void client_drained(Peer *c);

static const PeerOps client_ops = {client_handle, client_gone, client_drained};

#define EACH_CLIENT(c, p) \
    for (Peer *c = peers; c; c = c->next) \
        if (c->kind == PEER_CLIENT && c->proc == (p) && !c->gone)

static void send_eof(Peer *c, int stream)
{
    uint8_t body[1] = {(uint8_t)stream};
    Frame f = {.kind = K_EOF, .body = {body, 1}};
    peer_send(c, &f);
}

static void tail_add(Proc *p, const uint8_t *data, size_t n)
{
    if (n > WORDS_BYTES) {
        data += n - WORDS_BYTES;
        n = WORDS_BYTES;
    }
    size_t keep = p->tail_len + n > WORDS_BYTES ? WORDS_BYTES - n : p->tail_len;
    memmove(p->tail, p->tail + p->tail_len - keep, keep);
    memcpy(p->tail + keep, data, n);
    p->tail_len = keep + n;
}

static void guest_words(Proc *p, const uint8_t *data, size_t n)
{
    size_t room = GUEST_LOG_BYTES - p->guest_logged;
    if (n > room)
        n = room;
    p->guest_logged += n;
    log_guest(data, n);
}

void stream_words(Proc *p, const void *data, size_t n)
{
    if (p->tail)
        tail_add(p, data, n);
    guest_words(p, data, n);
}

/* `data` has a free byte before it, for the frame's body. */
void stream_deliver(Proc *p, int stream, const uint8_t *data, size_t n)
{
    if (p->flags & F_WORDS || p->tail)
        stream_words(p, data, n);
    if (p->flags & F_WORDS)
        return;
    if (p->up) {
        serial_deliver(p, stream, data, n);
        return;
    }
    if (p->flags & F_LOG)
        log_write(p, stream, data, n);
    uint8_t *body = (uint8_t *)data - 1;
    Frame f = {.kind = K_DATA, .body = {body, n + 1}};
    body[0] = (uint8_t)stream;
    EACH_CLIENT(c, p)
        peer_send(c, &f);
}

void stream_told_eof(Proc *p, int stream)
{
    p->ended_streams |= 1 << stream;
    if (p->up)
        serial_eof(p, stream);
    EACH_CLIENT(c, p)
        send_eof(c, stream);
}

static void stream_ended(Stream *s)
{
    Proc *p = s->proc;
    source_close(&s->source);
    if (!(p->flags & F_WORDS))
        stream_told_eof(p, s->stream);
}

/* The guest may hold a copy of a pty's master and make it blocking: never read one that has nothing. */
static bool nothing_there(const Stream *s)
{
    struct pollfd one = {s->source.fd, POLLIN, 0};
    return s->proc->remote && s->proc->flags & F_TTY && poll(&one, 1, 0) == 0;
}

/* One read. Positive: so many bytes; 0: end of file, closed; negative: nothing there now. */
static ssize_t pump(Stream *s)
{
    size_t room = s->proc->up ? serial_room(s->proc, s->stream) : MAX_DATA;
    if (!room || nothing_there(s))
        return -1;
    ssize_t n = read(s->source.fd, scratch + 1, room);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return -1;
    if (n <= 0) { /* a pty says EIO when its last slave is closed */
        stream_ended(s);
        return 0;
    }
    stream_deliver(s->proc, s->stream, scratch + 1, (size_t)n);
    return n;
}

static void output_ready(Source *source, uint32_t events)
{
    Stream *s = (Stream *)source;
    Proc *p = s->proc;
    (void)events;
    ssize_t n = pump(s);
    if (n > 0 && p->flags & F_CONTROL && !p->serial && p->state == ALIVE && p->guest_logged >= GUEST_LOG_BYTES)
        source_close(&s->source); /* its log is full: a talkative guest shall not cost us anything */
    if (n == 0)
        proc_finish(p);
    else
        stream_watch(p);
}

/* Does a client hold this process back? At the end what is there is taken all the same, within the queue's bound. */
bool stream_held_back(const Proc *p)
{
    size_t limit = p->state == DRAINING ? QUEUE_MAX - 4 * MAX_DATA : CLIENT_FULL;
    EACH_CLIENT(c, p)
        if (c->queued > limit)
            return true;
    return false;
}

void stream_watch(Proc *p)
{
    bool held = stream_held_back(p);
    for (int i = 0; i < 2; i++)
        if (p->out[i].source.fd >= 0)
            source_watch(&p->out[i].source, held || (p->up && !serial_room(p, i + 1)) ? 0 : EPOLLIN);
    if (p->number && !p->up)
        serial_acknowledge(p);
}

void stream_output(Proc *p, int stream, int fd)
{
    Stream *s = &p->out[stream - 1];
    source_init(&s->source, fd, output_ready);
    s->proc = p;
    s->stream = stream;
}

void stream_input(Proc *p, int fd)
{
    source_init(&p->in.source, fd, input_ready);
    p->in.proc = p;
}

/* What a process wrote before its end is in the pipe: no more than the pipe holds. A background child may write on. */
static void take_what_is_there(Stream *s)
{
    ssize_t left = fcntl(s->source.fd, F_GETPIPE_SZ), n;
    if (left < 0)
        left = PTY_BYTES;
    if (left > DRAIN_MAX)
        left = DRAIN_MAX;
    while (left > 0 && (n = pump(s)) > 0)
        left -= n;
}

/* An ended process of the agent's. Its keeper takes everything in the end; but one with more in its (enlarged) pipe
   than there is credit for does not wait for a slow client without bound. */
static bool waits(Proc *p, int i)
{
    int fd = p->out[i].source.fd, there = 0;
    if (!p->up || fd < 0 || serial_room(p, i + 1) || ioctl(fd, FIONREAD, &there) || !there)
        return false;
    if (serial_full(p))
        return true;
    if (!p->deadline_ms)
        p->deadline_ms = ticks_ms() + GRACE_MS;
    return p->deadline_ms > ticks_ms();
}

void stream_drain(Proc *p)
{
    for (int i = 0; i < 2; i++)
        if (p->out[i].source.fd >= 0)
            take_what_is_there(&p->out[i]);
    for (int i = 0; i < 2; i++)
        if (p->out[i].source.fd >= 0 && !waits(p, i))
            stream_ended(&p->out[i]);
}

bool stream_waits(Proc *p) { return waits(p, 0) || waits(p, 1); }

void stream_close(Proc *p)
{
    source_close(&p->out[0].source);
    source_close(&p->out[1].source);
    source_close(&p->in.source);
    buf_free(&p->leftover);
}

/* The master may come from a hostile guest: it must be one. Takes the descriptor. */
bool stream_set_master(Proc *p, int fd)
{
    struct stat st;
    unsigned number;
    int flags = fcntl(fd, F_GETFL);
    if (fstat(fd, &st) || !S_ISCHR(st.st_mode) || major(st.st_rdev) != 5 || minor(st.st_rdev) != 2 ||
        ioctl(fd, TIOCGPTN, &number) || flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK)) {
        close(fd);
        errno = ENOTTY;
        return false;
    }
    stream_output(p, 1, fd);
    if (p->flags & F_STDIN)
        stream_input(p, fcntl(fd, F_DUPFD_CLOEXEC, 10)); /* epoll wants one descriptor for each direction */
    return true;
}

static void give_credit(Peer *c, size_t n)
{
    uint8_t body[4];
    c->owed += n;
    if (c->owed < MAX_DATA && buf_size(&c->input))
        return;
    c->credit += c->owed;
    put_u32(body, (uint32_t)c->owed);
    c->owed = 0;
    Frame f = {.kind = K_CREDIT, .body = {body, 4}};
    peer_send(c, &f);
}

void stream_discard(Proc *p)
{
    buf_free(&p->leftover);
    EACH_CLIENT(c, p)
        if (buf_size(&c->input)) {
            size_t n = buf_size(&c->input);
            buf_take(&c->input, n);
            give_credit(c, n);
        }
}

static Buf *next_input(Proc *p, Peer **owner)
{
    *owner = NULL;
    if (buf_size(&p->leftover))
        return &p->leftover;
    EACH_CLIENT(c, p)
        if (buf_size(&c->input)) {
            *owner = c;
            return &c->input;
        }
    return NULL;
}

/* Stdin that travels as frames: to whoever is next. */
static void send_input(Proc *p)
{
    Peer *owner;
    Buf *b;
    size_t n;
    while (!p->input_closed && (b = next_input(p, &owner))) {
        if (!serial_input(p, buf_span(b), &n))
            return;
        buf_take(b, n);
        if (owner)
            give_credit(owner, n);
    }
    if (p->stdin_eof && !p->input_closed && !(p->flags & F_TTY)) /* the next client of a terminal may type, too */
        serial_input_eof(p);
}

static bool input_open(const Proc *p)
{
    bool framed = p->number && !p->up;
    return framed ? p->flags & F_STDIN && !p->input_closed && p->state == ALIVE : p->in.source.fd >= 0;
}

/* The agent's side of a process that has closed its stdin: what comes from now on is dropped, with credit for it. */
static void refuse_input(Proc *p)
{
    size_t n = buf_size(&p->leftover);
    p->input_closed = true;
    buf_free(&p->leftover);
    if (n)
        serial_written(p, n);
    serial_eof(p, 0);
}

void stream_write(Proc *p)
{
    Source *in = &p->in.source;
    Peer *owner;
    Buf *b;
    if (p->number && !p->up) {
        send_input(p);
        return;
    }
    while (in->fd >= 0 && (b = next_input(p, &owner))) {
        size_t n = buf_size(b);
        ssize_t w = write(in->fd, b->p + b->at, n < MAX_DATA ? n : MAX_DATA);
        if (w < 0 && (errno == EAGAIN || errno == EINTR)) {
            source_watch(in, EPOLLOUT);
            return;
        }
        if (w < 0) { /* it has closed its stdin: the client must not hang on that */
            source_close(in);
            p->up ? refuse_input(p) : stream_discard(p);
            return;
        }
        buf_take(b, (size_t)w);
        if (owner)
            give_credit(owner, (size_t)w);
        else if (p->up)
            serial_written(p, (size_t)w);
    }
    if (p->stdin_eof && !(p->flags & F_TTY))
        source_close(in);
    else
        source_watch(in, 0);
}

static void input_ready(Source *s, uint32_t events)
{
    (void)events;
    stream_write(((Stream *)s)->proc);
}

static void open_input(Peer *c, Proc *p)
{
    if (!c->stdin_wanted || !(p->flags & F_STDIN) || c->credit || p->state != ALIVE)
        return;
    give_credit(c, STDIN_CREDIT);
}

void client_attach(Proc *p, int fd, bool with_stdin)
{
    Peer *c = peer_new(fd, PEER_CLIENT, &client_ops);
    c->proc = p;
    c->stdin_wanted = with_stdin;
    for (int stream = 1; stream < 3; stream++)
        if (p->ended_streams & 1 << stream)
            send_eof(c, stream);
    open_input(c, p);
    if (p->state == ENDED)
        client_tell_exit(p);
}

void client_started(Proc *p)
{
    EACH_CLIENT(c, p)
        open_input(c, p);
    if (input_open(p))
        stream_write(p);
}

static void client_input(Peer *c, Span data)
{
    Proc *p = c->proc;
    if (data.n > c->credit) {
        peer_close(c);
        return;
    }
    c->credit -= data.n;
    if (!input_open(p)) {
        give_credit(c, data.n);
        return;
    }
    buf_add(&c->input, data.p, data.n);
    stream_write(p);
}

static void client_eof(Peer *c)
{
    if (!c->stdin_wanted || c->stdin_eof)
        return;
    c->stdin_eof = true;
    c->proc->stdin_eof = true;
    if (c->proc->state >= ALIVE && input_open(c->proc))
        stream_write(c->proc);
}

static void client_stream(Peer *c, const Frame *f)
{
    bool data = f->kind == K_DATA;
    if (!f->body.n || f->body.p[0] != 0 || f->body.n > (data ? MAX_DATA + 1 : 1) || f->nfds || (data && c->stdin_eof))
        peer_close(c);
    else if (data)
        client_input(c, (Span){f->body.p + 1, f->body.n - 1});
    else
        client_eof(c);
}

void client_handle(Peer *c, Frame *f)
{
    if (c->closing || !c->proc)
        return;
    if (f->kind == K_DATA || f->kind == K_EOF)
        client_stream(c, f);
    else if (f->kind == K_SIGNAL || f->kind == K_RESIZE)
        client_request(c, f);
    else
        peer_close(c);
}

static void client_gone(Peer *c)
{
    Proc *p = c->proc;
    if (!p)
        return;
    if (input_open(p) && buf_size(&p->leftover) + buf_size(&c->input) <= LEFTOVER_MAX)
        buf_add(&p->leftover, c->input.p + c->input.at, buf_size(&c->input));
    buf_free(&c->input);
    client_eof(c);
    c->proc = NULL;
    if (p->state != PENDING)
        stream_watch(p);
    else if (!p->stdin_eof && !client_any(p))
        proc_drop(p);
}

static void client_drained(Peer *c)
{
    if (c->proc)
        stream_watch(c->proc);
}

bool client_any(Proc *p)
{
    EACH_CLIENT(c, p)
        return true;
    return false;
}

static void end_clients(Proc *p, uint8_t kind, Buf *body)
{
    EACH_CLIENT(c, p) {
        Frame f = {.kind = kind, .body = buf_span(body)};
        peer_send(c, &f);
        c->proc = NULL;
        peer_finish(c);
    }
}

void client_tell_exit(Proc *p)
{
    Buf body = {0};
    proc_put_exit(&body, p);
    end_clients(p, K_EXITED, &body);
    buf_free(&body);
}

void client_tell_failure(Proc *p, Buf *body) { end_clients(p, K_ERROR, body); }
