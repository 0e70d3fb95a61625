#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

struct Out {
    Out *next;
    size_t at, len;
    int nfds, fds[MAX_FDS];
    uint8_t data[];
};

Peer *peers;
static uint32_t serials;

static void peer_ready(Source *s, uint32_t events);

Peer *peer_new(int fd, uint8_t kind, const PeerOps *ops)
{
    Peer *p = xalloc(sizeof *p);
    int type;
    socklen_t n = sizeof type;
    source_init(&p->source, fd, peer_ready);
    p->passes_fds = !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &n);
    p->kind = kind;
    p->ops = ops;
    p->serial = ++serials;
    p->next = peers;
    peers = p;
    source_watch(&p->source, EPOLLIN);
    return p;
}

Peer *peer_by_serial(uint32_t serial)
{
    for (Peer *p = peers; p; p = p->next)
        if (p->serial == serial)
            return p;
    return NULL;
}

int peer_count(uint8_t kind)
{
    int n = 0;
    for (Peer *p = peers; p; p = p->next)
        n += p->kind == kind && !p->gone;
    return n;
}

static bool full(const Peer *p) { return p->patient && p->queued > CHANNEL_FULL; }

/* Has it something that may be written now? */
static bool has_due(const Peer *p) { return p->first && (!p->hushed || p->due); }

static void watch(Peer *p) { source_watch(&p->source, (full(p) ? 0 : EPOLLIN) | (has_due(p) ? EPOLLOUT : 0)); }

static void drop_queue(Peer *p)
{
    while (p->first) {
        Out *o = p->first;
        p->first = o->next;
        for (int i = 0; i < o->nfds; i++)
            close(o->fds[i]);
        free(o);
    }
    p->last = NULL;
    p->queued = 0;
}

static void drop_fds(Peer *p)
{
    for (int i = 0; i < p->nfds; i++)
        close(p->fds[i]);
    p->nfds = 0;
}

void peer_close(Peer *p)
{
    if (p->gone)
        return;
    p->gone = true;
    if (p->ops->gone)
        p->ops->gone(p);
    drop_queue(p);
    drop_fds(p);
    source_close(&p->source);
    buf_free(&p->input);
    for (Peer **at = &peers; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            break;
        }
    /* p->in stays: the caller may stand in the middle of a frame in it */
    release(p->in.p);
    release(p);
}

/* Unread input would turn the other side's end of file into a connection reset. */
static void finish_now(Peer *p)
{
    char rest[512];
    while (recv(p->source.fd, rest, sizeof rest, MSG_DONTWAIT) > 0)
        ;
    peer_close(p);
}

void peer_finish(Peer *p)
{
    p->closing = true;
    if (!p->first && !p->gone)
        finish_now(p);
}

static ssize_t transmit(Peer *p, struct iovec *iov, int n, const int *fds, int nfds)
{
    union {
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
        struct cmsghdr align;
    } control;
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = n};
    if (!p->passes_fds)
        return writev(p->source.fd, iov, n);
    if (nfds) {
        memset(&control, 0, sizeof control);
        m.msg_control = control.room;
        m.msg_controllen = CMSG_SPACE(sizeof(int) * nfds);
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * nfds);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * nfds);
    }
    return sendmsg(p->source.fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static bool would_block(void) { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

static void enqueue(Peer *p, const uint8_t *header, Span body, size_t sent, const int *fds, int nfds)
{
    size_t total = HEADER_BYTES + body.n;
    Out *o = xalloc(sizeof *o + total - sent);
    o->len = total - sent;
    size_t h = sent < HEADER_BYTES ? HEADER_BYTES - sent : 0;
    memcpy(o->data, header + HEADER_BYTES - h, h);
    if (o->len > h)
        memcpy(o->data + h, body.p + body.n - (o->len - h), o->len - h);
    for (int i = 0; i < nfds; i++)
        if ((o->fds[o->nfds] = fcntl(fds[i], F_DUPFD_CLOEXEC, 10)) >= 0)
            o->nfds++;
    if (p->last)
        p->last->next = o;
    else
        p->first = o;
    p->last = o;
    p->queued += o->len;
    watch(p);
}

void peer_send(Peer *p, Frame *f)
{
    uint8_t header[HEADER_BYTES];
    size_t sent = 0;
    if (p->gone || p->broken || p->closing)
        return;
    wire_pack_header(header, f);
    if (!p->first && !p->hushed) {
        struct iovec iov[2] = {{header, HEADER_BYTES}, {(void *)f->body.p, f->body.n}};
        ssize_t n = transmit(p, iov, 2, f->fds, f->nfds);
        if (n < 0 && !would_block()) {
            p->broken = true; /* its end is noticed when reading: it may have sent something before */
            return;
        }
        sent = n > 0 ? (size_t)n : 0;
    }
    if (sent == HEADER_BYTES + f->body.n)
        return;
    if (p->queued + f->body.n > QUEUE_MAX) {
        peer_close(p); /* nobody is waited for without bound */
        return;
    }
    enqueue(p, header, f->body, sent, f->fds, sent ? 0 : f->nfds);
}

void peer_reply(Peer *p, uint8_t kind, uint32_t id, Buf *body)
{
    Frame f = {.kind = kind, .id = id};
    if (body)
        f.body = buf_span(body);
    peer_send(p, &f);
    if (body)
        buf_free(body);
}

static void flush(Peer *p)
{
    while (has_due(p)) {
        Out *o = p->first;
        struct iovec iov = {o->data + o->at, o->len - o->at};
        ssize_t n = transmit(p, &iov, 1, o->fds, o->nfds);
        if (n < 0) {
            if (would_block())
                return;
            p->broken = true;
            drop_queue(p);
            break;
        }
        for (int i = 0; i < o->nfds; i++)
            close(o->fds[i]);
        o->nfds = 0;
        o->at += (size_t)n;
        p->queued -= (size_t)n;
        p->due -= p->hushed ? (size_t)n : 0;
        if (o->at < o->len)
            return;
        p->first = o->next;
        if (!p->first)
            p->last = NULL;
        free(o);
    }
    if (p->closing)
        finish_now(p);
}

void peer_hush(Peer *p)
{
    p->hushed = true;
    p->due = p->queued;
    watch(p);
}

void peer_speak(Peer *p)
{
    if (!p->hushed || p->gone)
        return;
    p->hushed = false;
    watch(p);
    if (p->ops->drained)
        p->ops->drained(p); /* whoever waited for room waits no more */
}

void peer_forget(Peer *p)
{
    drop_queue(p);
    p->due = 0;
    watch(p);
}

static bool take_fds(Peer *p, struct msghdr *m)
{
    bool fine = !(m->msg_flags & MSG_CTRUNC);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (p->nfds < (int)LEN(p->fds))
                p->fds[p->nfds++] = fd;
            else {
                close(fd);
                fine = false;
            }
        }
    }
    return fine;
}

static ssize_t receive(Peer *p, void *into, size_t size)
{
    union {
        char room[CMSG_SPACE(sizeof(int) * 4 * MAX_FDS)];
        struct cmsghdr align;
    } control;
    struct iovec iov = {into, size};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (!p->passes_fds)
        return read(p->source.fd, into, size);
    ssize_t n = recvmsg(p->source.fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n >= 0 && !take_fds(p, &m))
        return 0;
    return n;
}

static bool frame_fds(Peer *p, Frame *f)
{
    if (f->nfds > p->nfds)
        return false;
    for (int i = 0; i < f->nfds; i++)
        f->fds[i] = p->fds[i];
    p->nfds -= f->nfds;
    memmove(p->fds, p->fds + f->nfds, sizeof(int) * p->nfds);
    return true;
}

/* Handle one frame of the buffer. False: none is complete, or the peer ended. */
static bool one_frame(Peer *p)
{
    Frame f = {0};
    Span have = buf_span(&p->in);
    size_t body;
    if (have.n < HEADER_BYTES)
        return false;
    if (!wire_header(have.p, &body, &f)) {
        peer_close(p);
        return false;
    }
    if (have.n < HEADER_BYTES + body)
        return false;
    f.body = (Span){have.p + HEADER_BYTES, body};
    if (!frame_fds(p, &f) || (!wire_raw(f.kind) && !wire_valid(f.body))) {
        for (int i = 0; i < f.nfds && f.fds[i] > 0; i++)
            close(f.fds[i]);
        peer_close(p);
        return false;
    }
    p->ops->frame(p, &f);
    request_end();
    for (int i = 0; i < f.nfds; i++)
        close_fd(&f.fds[i]);
    if (p->gone)
        return false;
    buf_take(&p->in, HEADER_BYTES + body);
    return true;
}

static size_t wanted(const Peer *p)
{
    Span have = buf_span(&p->in);
    if (have.n < HEADER_BYTES)
        return p->passes_fds ? 4096 : MAX_DATA + HEADER_BYTES + 1;
    return HEADER_BYTES + get_u32(have.p) - have.n; /* one_frame() checked the length before it left it here */
}

static void handle(Peer *p)
{
    while (!full(p) && one_frame(p))
        ;
    if (!p->gone && !buf_size(&p->in))
        drop_fds(p); /* they belong to no frame */
}

bool peer_read(Peer *p)
{
    if (p->gone || full(p))
        return false;
    uint8_t *into = buf_room(&p->in, wanted(p));
    ssize_t n = receive(p, into, p->in.cap - p->in.len);
    if (n < 0 && would_block())
        return false;
    if (n == 0 && p->device) {
        source_watch(&p->source, 0); /* nobody is there: the node looks again later */
        return false;
    }
    if (n <= 0) {
        peer_close(p);
        return false;
    }
    p->in.len += (size_t)n;
    handle(p);
    return !p->gone;
}

/* HUP is reported for as long as nobody is there, so meanwhile it is not watched at all. */
static bool away(const Peer *p, uint32_t events) { return p->device && events & EPOLLHUP && !(events & EPOLLIN); }

bool peer_look(Peer *p)
{
    struct pollfd one = {p->source.fd, POLLIN, 0};
    if (poll(&one, 1, 0) > 0 && away(p, (uint32_t)one.revents))
        return false;
    watch(p);
    return true;
}

static void written(Peer *p, size_t before)
{
    if (p->gone)
        return;
    watch(p);
    if (p->queued < before && p->ops->drained)
        p->ops->drained(p);
    if (buf_size(&p->in) && !p->gone)
        handle(p); /* what was not listened to while the queue was full */
}

static void peer_ready(Source *s, uint32_t events)
{
    Peer *p = (Peer *)s;
    if (events & EPOLLOUT) {
        size_t before = p->queued;
        flush(p);
        written(p, before);
    }
    if (p->gone)
        return;
    if (away(p, events))
        source_watch(&p->source, 0);
    else if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        peer_read(p);
}
