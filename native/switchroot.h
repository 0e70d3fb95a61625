/* The first program of an initrd whose file /switch-root says where the real root is. */
#ifndef ISOLAT_SWITCHROOT_H
#define ISOLAT_SWITCHROOT_H

/* Returns where there is no /switch-root. Else it becomes the init that the file names, or ends (PID 1: a panic). */
void switch_root(void);

#endif
