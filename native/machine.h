/* What only the agent of a machine does. */
#ifndef ISOLAT_MACHINE_H
#define ISOLAT_MACHINE_H

#include "node.h"

int boot_as_pid1(void);       /* from the initramfs to a root of our own; the port's descriptor */
int boot_service_port(void);  /* the port, in a whole operating system; dies where there is none */
bool machine_request(Peer *who, Frame *f); /* RESUME, SETTLE, IDLE */
int64_t idle_ms(void);        /* until something in here runs by itself; 0: now, -1: never */
bool lacked_memory(void);     /* the kernel has killed something for want of memory, since this machine is its own */
int print_tsc_khz(void);
int ahead_main(int argc, char **argv); /* --ahead, --nothing; -1: neither */
void idle_answer(Peer *who, uint32_t id);
void exercise_learn(const Command *c); /* how an application is started */
bool exercise(Peer *who, uint32_t id); /* true: IDLE is answered when a program has been started and has ended */
void exercise_turn(void);
extern bool machine_is_ours;  /* the agent of a machine, not an ordinary process of one that others use */

#endif
