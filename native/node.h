/* A node holds processes for controllers: the keeper outside, the init inside. One code, few differences (Node). */
#ifndef ISOLAT_NODE_H
#define ISOLAT_NODE_H

#include "peer.h"
#include "spawn.h"

enum { PROCS_MAX = 1024, CONTROLLERS_MAX = 16, CLIENTS_MAX = 256, WAITERS_MAX = 4 };
enum { TAIL_BYTES = 2048, WORDS_BYTES = 4096, GUEST_LOG_BYTES = 64 << 10 };
/* A DATA frame costs its bytes and SERIAL_FRAME, or many small ones would take more memory than their credit says.
   The reserve: what a pipe holds, in frames. */
enum { SERIAL_CREDIT = 256 << 10, SERIAL_RESERVE = 72 << 10, SERIAL_BATCH = 64 << 10, SERIAL_FRAME = 16 };
enum { HELD_MAX = 32 };
enum { GRACE_MS = 2000 };
enum { F_WORDS = F_CONTROL | F_BESIDE }; /* what such a process writes are its own words, and nobody's streams */

typedef enum {
    PENDING,  /* clients wait for it */
    STARTING, /* forked, or asked of a guest */
    ALIVE,
    DRAINING, /* it ended; its output has not */
    ENDED,
} State;

typedef struct {
    uint32_t peer, id;
} Waiter;

typedef struct {
    Source source; /* first */
    Proc *proc;
    int stream;
} Stream;

typedef struct {
    int dir, fd; /* fd: of the newest file; -1: none yet */
    int64_t written;
} Log;

struct Proc {
    Proc *next;
    char *name; /* full */
    State state;
    int flags;
    pid_t pid, launcher; /* 0: none. A remote process's pid is its guest's number */
    bool remote;
    Proc *guest;         /* the first hop of a remote process, while that one is alive */
    int code, signal;
    int64_t started_ns, ended_ns;
    int64_t deadline_ms; /* of the last draining; 0: none */
    /* start */
    Source result;       /* the child's Failure, or end of file after its exec */
    bool launched, early; /* the launcher is through; the process ended before we knew that it had started */
    char *pidfile;
    Waiter waiters[WAITERS_MAX];
    int nwaiters;
    int master;    /* of a pty that goes up with the OK; -1 */
    Peer *control; /* to what was spawned with CONTROL */
    bool greeted;  /* it has said HELLO */
    bool unbound;  /* at an agent: its host is another one now, which does not know it yet */
    /* streams */
    Stream out[2];
    int ended_streams; /* bits: EOF was told */
    Stream in;
    bool stdin_eof;
    Buf leftover; /* what clients that left had sent */
    char *tail;   /* a launcher's last words while it starts; always of a guest, and of what is beside it */
    size_t tail_len, guest_logged;
    /* streams that travel as frames of a serial channel: to a guest (keeper), or from our controller (agent) */
    uint32_t number;    /* 0: they don't */
    uint32_t up;        /* the agent's controller, by its serial */
    bool input_closed;  /* it takes no more */
    size_t may_send[3]; /* stdin at the keeper, output at the agent */
    size_t may_come[3]; /* the other way */
    size_t owed[3];     /* written, but no credit given for it yet */
    size_t foreign;     /* of the leftover stdin: what came from another host, so without credit */
    /* of a guest */
    bool serial;        /* its channel has no descriptors, and it greets when asked */
    int64_t spoke_ms, park_ms, park_wait_ms;
    int64_t wake_ms;    /* of a parked one: when something in it runs by itself; 0: never */
    uint8_t parked;     /* Parking */
    uint32_t asked;     /* the number of the latest IDLE */
    bool exercised;     /* something was started in it besides MAIN, if only for the exercise */
    uint32_t hushed_by; /* the controller that keeps its channel silent, by its serial */
    int64_t grace_ms, kill_by_ms; /* for its own end after MAIN's; 0: none */
    char **after;    /* what is done between its end and telling it; NULL: nothing */
    pid_t after_pid; /* that, while it is done */
    /* of what is in a guest */
    bool with_guest;    /* it ended because its guest did */
    bool oom;           /* it ended badly, and the machine's kernel has killed something for want of memory */
    Log *home;          /* of an environment of its own: its log and its record; NULL: the keeper's own */
};

enum Parking { AWAKE, ASKED, PARKED };

typedef struct {
    const char *role;
    bool keeper;         /* has clients, writes logs and the exit record */
    bool holds;          /* streams end here: keeper and agent. The init passes descriptors on instead */
    bool after;          /* does what is to be done after a process's end: the agent */
    bool pid1;
    bool quitting, done; /* done: leave the main loop */
    int64_t quit_by_ms, idle_since_ms;
    Waiter quitter;
    bool (*on_machine)(Peer *who, Frame *f); /* the agent's: RESUME, SETTLE, IDLE; false: not for it */
    void (*on_spawn)(const Command *c); /* the agent's, of what is neither a guest nor a launcher */
    void (*on_turn)(void);
    bool (*lacked_memory)(void); /* the agent's, of its machine; NULL: not known */
    int64_t idle_ms;     /* how long a keeper stays without MAIN and without a controller */
    int dir;             /* the keeper's DIR, else -1 */
    int home_mounts;     /* the mount namespace that the keeper came from, else -1 */
    bool sweeping;       /* orphans of a dead guest are being killed */
    Proc *procs;
    int nprocs;
    bool main_spawned, main_ended;
} Node;
extern Node node;

/* node.c */
void node_open(void);
void node_run(void); /* until node.done */
void node_quit(Peer *who, uint32_t id); /* SIGKILL what is held, reap, answer, leave */
void kill_strays(void); /* children that we did not spawn: orphans of a guest that is no pid namespace */
bool launching(void);
bool node_busy(void); /* something of its own is still to come: output, a start, an end */
bool signal_strays(int signal, bool all_children);
void kill_all(int signal, bool guests);
Peer *controller_new(int fd);
Peer *controller_new_serial(int fd);

/* proc.c: the table, and the life of a process */
Proc *proc_find(const char *name);
Proc *proc_new(const char *name, int flags); /* NULL: too many */
void proc_drop(Proc *p);
void proc_started(Proc *p);
void proc_check_start(Proc *p); /* started, as far as its kind demands? */
void proc_failed(Proc *p, const Failure *f);
void proc_refused(Proc *p, Buf *body); /* the same, with the ERROR that a guest gave */
void proc_exited(Proc *p, int code, int signal);
void proc_finish(Proc *p);
void proc_wait_start(Proc *p, Peer *who, uint32_t id);
bool proc_spawn(Proc *p, Command *c, int rows, int cols, Failure *f);
bool proc_streams(Proc *p, int fds[3]); /* pipes: the child's ends into fds, ours into the streams */
void proc_reap(void);
void proc_kill(Proc *p, int signal, int scope);
void proc_tick(int64_t now_ms, int *timeout_ms);
void proc_put_exit(Buf *b, const Proc *p);

/* stream.c: output to log and clients, stdin from clients */
void stream_output(Proc *p, int stream, int fd);
void stream_input(Proc *p, int fd);
void stream_watch(Proc *p);
void stream_drain(Proc *p); /* what is there now, then close */
bool stream_waits(Proc *p);          /* an end whose last output can't be told yet */
void stream_close(Proc *p);
void stream_deliver(Proc *p, int stream, const uint8_t *data, size_t n); /* to log and clients */
void stream_words(Proc *p, const void *data, size_t n); /* to those of a guest */
void stream_told_eof(Proc *p, int stream);
bool stream_held_back(const Proc *p);
void stream_write(Proc *p);          /* what there is of stdin */
void stream_discard(Proc *p);
bool stream_set_master(Proc *p, int fd);
void client_attach(Proc *p, int fd, bool with_stdin);
void client_started(Proc *p);
bool client_any(Proc *p);
void client_handle(Peer *c, Frame *f);
void client_tell_exit(Proc *p);
void client_tell_failure(Proc *p, Buf *body);

/* serial.c */
void serial_open_guest(Proc *g);                       /* greet what will speak sooner or later */
bool serial_greet(Proc *g, const Frame *f);
void serial_started_remote(Proc *p);                   /* its streams are frames from now on */
void serial_started_local(Proc *p, Peer *up, uint32_t number);
bool serial_from_guest(Proc *g, const Frame *f);       /* false: a breach */
void serial_from_controller(Peer *up, const Frame *f);
size_t serial_room(const Proc *p, int stream);         /* how much of an output may be read now */
bool serial_full(const Proc *p);                       /* the channel is, whatever credit there is */
void serial_deliver(Proc *p, int stream, const uint8_t *data, size_t n);
void serial_eof(Proc *p, int stream);
bool serial_input(Proc *p, Span data, size_t *taken);  /* keeper: towards the guest */
void serial_input_eof(Proc *p);
void serial_acknowledge(Proc *p);                      /* keeper: credit for what clients have taken */
void serial_written(Proc *p, size_t n);                /* agent: the same for stdin */
void serial_drained(const Peer *channel);
void serial_ended(Proc *p);

/* park.c: a machine in which nothing will happen by itself is stopped until somebody says something, or its time comes */
void park_spoke(Proc *g);                              /* before every frame to it, and after one from it */
bool park_answer(Proc *g, const Frame *f);             /* true: it was for us */
void park_woken(Proc *g);
void park_tick(int64_t now_ms, int *timeout_ms);

/* hush.c: silence on a serial channel, and a machine that has come to another host */
bool hushed(const Proc *g);
void hush_guest(Peer *who, const Frame *f, const char *to);
void hush_self(Peer *who, const Frame *f);
void hush_controller_gone(const Peer *who);
void hush_new_host(Peer *who);
void hush_bind(Peer *who, const Frame *f, Proc *p);    /* a process that is there to this host */

/* after.c */
void after_set(Proc *p, const Frame *f);
void after_free(Proc *p);
bool after_begins(Proc *p, int code, int signal); /* true: its end is told later */
bool after_ended(pid_t pid);                      /* true: it was one of these */

/* hold.c: descriptors kept by name */
void hold(Peer *who, Frame *f);
void fetch(Peer *who, const Frame *f);
void drop(Peer *who, const Frame *f);
int held_fd(const char *name);                         /* -1: none; it stays ours */

/* guest.c */
void guest_send(Proc *g, Frame *f);
void guest_leave(Proc *p); /* MAIN has ended: it goes, at once or in its grace */
void guest_open(Proc *p, int fd);
void guest_kill(Proc *p);
void guest_ended(Proc *p);
void guest_lost_beside(const Proc *p); /* what was BESIDE it has ended */

/* forward.c */
Proc *forward_guest(const char *to, const char **rest); /* NULL: no such guest */
bool forward(Proc *guest, const char *rest, const Frame *f, Peer *who, uint32_t id, Proc *spawned, int flags);
bool forward_reply(Proc *guest, Frame *f);
void forward_guest_gone(Proc *guest);

/* requests.c */
void request_handle(Peer *who, Frame *f);
void client_request(Peer *who, Frame *f); /* SIGNAL or RESIZE for its own process */
void reply_ok(Peer *who, uint32_t id);
void reply_error(Peer *who, uint32_t id, const char *stage, int error, const char *message);
void put_failure(Buf *b, const Failure *f, const char *tail, size_t n);

/* files.c, steps.c */
void file_read(Peer *who, const Frame *f);
void file_write(Peer *who, const Frame *f);
bool remove_tree(const char *path); /* absolute, with a parent of its own */
bool steps_do(Span body, int *fds, int nfds, Failure *f, Buf *tail);
int userns_with(const char *map); /* a new user namespace, with these lines as both of its maps */

/* logs.c */
void log_open(int64_t bytes, int files);
void log_write(const Proc *p, int stream, const void *data, size_t n);
void log_guest(const void *p, size_t n);
void log_exit(const Proc *p);
bool home_open(Proc *p, const char *dir); /* false, with errno: there is no such directory */
void home_close(Proc *p);
void log_tail(const void *p, size_t n); /* a guest's last words */

#endif
