#include "loop.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>

static int epoll = -1;

typedef struct Grave {
    struct Grave *next;
    void *what;
} Grave;
static Grave *graves;

void loop_open(void)
{
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0 || (epoll = move_high(epoll)) < 0)
        die("epoll");
}

void source_init(Source *s, int fd, void (*ready)(Source *, uint32_t))
{
    s->fd = fd;
    s->events = 0;
    s->ready = ready;
}

void source_watch(Source *s, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = s};
    if (s->fd < 0 || events == s->events)
        return;
    int op = !events ? EPOLL_CTL_DEL : s->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (epoll_ctl(epoll, op, s->fd, &e) && op == EPOLL_CTL_ADD && errno != EPERM)
        die("epoll_ctl");
    s->events = events;
}

void source_close(Source *s)
{
    source_watch(s, 0); /* a descriptor that somebody else holds too would stay in the epoll set */
    close_fd(&s->fd);
}

void release(void *p)
{
    Grave *g = xalloc(sizeof *g);
    g->next = graves;
    g->what = p;
    graves = g;
}

static void bury(void)
{
    while (graves) {
        Grave *next = graves->next;
        free(graves->what);
        free(graves);
        graves = next;
    }
}

void loop_turn(int timeout_ms)
{
    struct epoll_event events[16];
    int n = epoll_wait(epoll, events, LEN(events), timeout_ms);
    for (int i = 0; i < n; i++) {
        Source *s = events[i].data.ptr;
        if (s->fd >= 0 && s->events)
            s->ready(s, events[i].events);
    }
    bury();
}

bool loop_more(void)
{
    struct pollfd one = {epoll, POLLIN, 0};
    return poll(&one, 1, 0) > 0;
}
