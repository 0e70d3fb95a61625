/* One thread, one epoll. Whoever is released while events are handled is freed after the batch. */
#ifndef ISOLAT_LOOP_H
#define ISOLAT_LOOP_H

#include "base.h"

typedef struct Source Source;
struct Source {
    int fd; /* -1: none; events for it are dropped */
    uint32_t events;
    void (*ready)(Source *, uint32_t events);
};

void loop_open(void);
void source_init(Source *s, int fd, void (*ready)(Source *, uint32_t));
void source_watch(Source *s, uint32_t events); /* 0: not watched at all, since HUP is always reported otherwise */
void source_close(Source *s);
void release(void *p); /* free() after this batch */
void loop_turn(int timeout_ms);
bool loop_more(void); /* is there something to do that has not been begun? */

#endif
