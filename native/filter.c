/* A system call filter (seccomp(2)) for what a guest's words reach before anybody else: a program like QEMU, which may
   have a filter of its own on top of it, or be too old for a good one.

   It is a deny-list of what such a program never asks for and an attacker does: further parts of the kernel (networks,
   io_uring, BPF, keys, performance counters), other processes, mounts and namespaces. clone3, whose flags are in memory
   where no filter sees them, is told not to exist: C libraries then call clone. Nothing but the numbers is looked at
   where a call is allowed, so the kernel remembers its answer for these and the filter costs nothing. */
#include "spawn.h"

#include <endian.h>
#include <errno.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

/* linux/filter.h, linux/seccomp.h, linux/audit.h, which musl's headers lack */
enum { LOAD = 0x20, EQUAL = 0x15, AT_LEAST = 0x35, ANY_BIT = 0x45, RETURN = 0x06 };
enum { NUMBER_AT = 0, ARCHITECTURE_AT = 4, FIRST_ARGUMENT_AT = 16 };
#define KILL 0x80000000u
#define ALLOW 0x7fff0000u
#define FAIL(error) (0x00050000u | (error))
#define MODE_FILTER 2
#if defined __x86_64__
#define ARCHITECTURE 0xc000003eu
#elif defined __aarch64__
#define ARCHITECTURE 0xc00000b7u
#endif
#define X32 0x40000000u /* x86_64's second table: the same numbers with this bit */
#define NEW_SPACES 0x7e020000u /* CLONE_NEW* of clone(2) */
_Static_assert(BYTE_ORDER == LITTLE_ENDIAN, "an argument's lower half is its first");

struct instruction {
    uint16_t code;
    uint8_t if_true, if_false;
    uint32_t value;
};
struct program {
    unsigned short length;
    struct instruction *first;
};

static const int denied[] = {
    /* io_uring, userfaultfd, BPF, perf, keys */
    425, 426, 427, SYS_userfaultfd, SYS_bpf, SYS_perf_event_open, SYS_add_key, SYS_request_key, SYS_keyctl,
    /* other processes: process_madvise, pidfd_getfd among them */
    SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_kcmp, SYS_migrate_pages, SYS_move_pages, 438, 440,
    /* mounts: open_tree to fspick, mount_setattr, statmount, listmount, open_tree_attr */
    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, 428, 429, 430, 431, 432, 433, 442, 457, 458, 467,
    /* namespaces, and files by their numbers */
    SYS_unshare, SYS_setns, SYS_name_to_handle_at, SYS_open_by_handle_at, SYS_fanotify_init, SYS_fanotify_mark,
    /* the machine itself: quotactl_fd among it */
    SYS_kexec_load,
#ifdef SYS_kexec_file_load
    SYS_kexec_file_load,
#endif
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_reboot, SYS_swapon, SYS_swapoff, SYS_acct, SYS_syslog,
    SYS_quotactl, 443, SYS_settimeofday, SYS_clock_settime, SYS_clock_adjtime, SYS_adjtimex, SYS_sethostname,
    SYS_setdomainname, SYS_vhangup, SYS_vmsplice, SYS_personality,
#ifdef __x86_64__
    SYS_iopl, SYS_ioperm, SYS_modify_ldt,
#endif
};
enum { DENIED = sizeof denied / sizeof *denied, NR_CLONE3 = 435 };

static struct instruction *put(struct instruction *at, uint16_t code, uint8_t if_true, uint8_t if_false, uint32_t value)
{
    *at = (struct instruction){code, if_true, if_false, value};
    return at + 1;
}

static struct instruction *refuse(struct instruction *at, uint32_t number, uint32_t answer)
{
    at = put(at, EQUAL, 0, 1, number);
    return put(at, RETURN, 0, 0, answer);
}

/* Decided by a test of the first argument, of which the kernel, too, takes only the lower half. */
static struct instruction *by_argument(struct instruction *at, uint32_t number, uint16_t test, uint32_t value,
                                       uint32_t if_true, uint32_t if_false)
{
    at = put(at, EQUAL, 0, 4, number);
    at = put(at, LOAD, 0, 0, FIRST_ARGUMENT_AT);
    at = put(at, test, 0, 1, value);
    at = put(at, RETURN, 0, 0, if_true);
    return put(at, RETURN, 0, 0, if_false);
}

bool filter_install(void)
{
    struct instruction program[2 * DENIED + 24], *at = program;
    at = put(at, LOAD, 0, 0, ARCHITECTURE_AT);
    at = put(at, EQUAL, 1, 0, ARCHITECTURE);
    at = put(at, RETURN, 0, 0, KILL);
    at = put(at, LOAD, 0, 0, NUMBER_AT);
#ifdef __x86_64__
    at = put(at, AT_LEAST, 0, 1, X32);
    at = put(at, RETURN, 0, 0, FAIL(ENOSYS));
#endif
    at = by_argument(at, SYS_socket, EQUAL, AF_UNIX, ALLOW, FAIL(EAFNOSUPPORT));
    at = by_argument(at, SYS_clone, ANY_BIT, NEW_SPACES, FAIL(EPERM), ALLOW);
    at = refuse(at, NR_CLONE3, FAIL(ENOSYS));
    for (int i = 0; i < DENIED; i++)
        at = refuse(at, (uint32_t)denied[i], FAIL(EPERM));
    at = put(at, RETURN, 0, 0, ALLOW);
    return !prctl(PR_SET_SECCOMP, MODE_FILTER, &(struct program){(unsigned short)(at - program), program}, 0, 0);
}
