/* A connection that speaks the protocol: frames in, frames out, descriptors with them where the transport has them. */
#ifndef ISOLAT_PEER_H
#define ISOLAT_PEER_H

#include "loop.h"
#include "wire.h"

typedef struct Peer Peer;
typedef struct Proc Proc;
typedef struct Out Out;

enum { PEER_CONTROLLER, PEER_CLIENT, PEER_GUEST };
enum { QUEUE_MAX = 4 << 20, CHANNEL_FULL = 1 << 20, CLIENT_FULL = 256 << 10, STDIN_CREDIT = 256 << 10 };

typedef struct {
    void (*frame)(Peer *, Frame *);
    void (*gone)(Peer *);    /* it ended; the peer is released afterwards */
    void (*drained)(Peer *); /* its out-queue became shorter */
} PeerOps;

struct Peer {
    Source source; /* first: a Source * is a Peer * */
    Peer *next;
    const PeerOps *ops;
    uint32_t serial; /* names it in what may outlive it */
    uint8_t kind;
    bool passes_fds;
    bool device;  /* a port: nothing to read may mean that nobody is at its other end */
    bool patient; /* who does not take the answers is not cut off, but not listened to meanwhile */
    bool hushed;  /* after what is due now nothing is written until somebody says so */
    bool closing; /* ends when its queue is empty */
    bool broken;  /* can't be written to any more, but may have sent something */
    bool gone;
    Buf in;
    int fds[4 * MAX_FDS], nfds; /* received, not yet taken by a frame */
    Out *first, *last;
    size_t queued, due;
    Proc *proc; /* a client's process; the process at the other end of a guest's channel */
    /* of a client */
    bool stdin_wanted, stdin_eof;
    size_t credit, owed; /* what it may send; what has been written since its last CREDIT */
    Buf input;
};

extern Peer *peers;

Peer *peer_new(int fd, uint8_t kind, const PeerOps *ops);
Peer *peer_by_serial(uint32_t serial);
int peer_count(uint8_t kind);
void peer_send(Peer *p, Frame *f); /* keeps its own copies of the descriptors */
void peer_reply(Peer *p, uint8_t kind, uint32_t id, Buf *body); /* frees the body */
void peer_close(Peer *p);
void peer_hush(Peer *p);
void peer_speak(Peer *p);
void peer_forget(Peer *p); /* nothing of what is queued is ever sent */
void peer_finish(Peer *p); /* close after what is queued */
bool peer_read(Peer *p);  /* one receive; false: nothing there now, or gone */
bool peer_look(Peer *p);  /* a device that nobody was at the other end of: is it watched again? */

#endif
