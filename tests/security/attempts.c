/* Tries, inside an environment, the system calls that escapes are made of, and prints one "name<TAB>ERRNO" line each.
 *
 * Each is made by number, with arguments that do no harm if it should be allowed and that the kernel would answer with
 * something else than EPERM or ENOSYS where it looks at them: so these two mean that it was refused before that. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_fspick
#define SYS_fspick 433
#endif

typedef struct {
    const char *name;
    long number, a, b, c, d, e;
} Attempt;

#define P(x) ((long)(uintptr_t)(x))

static uint64_t zeros[64], clone3_args[8] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
static uint32_t perf_attributes[28] = {1, 112};
static int64_t no_time[2] = {-1, -1};
static char room[4096];

static long parent_vector[2];

/* The calls whose numbers every architecture of ours has. */
static Attempt attempts[] = {
    {"unshare a mount namespace", SYS_unshare, CLONE_NEWNS},
    {"unshare a user namespace", SYS_unshare, CLONE_NEWUSER},
    {"unshare a network namespace", SYS_unshare, CLONE_NEWNET},
    {"clone a user namespace", SYS_clone, CLONE_NEWUSER | SIGCHLD},
    {"clone a mount namespace", SYS_clone, CLONE_NEWNS | SIGCHLD},
    {"clone3 a user namespace", SYS_clone3, P(clone3_args), sizeof clone3_args},
    {"setns", SYS_setns, -1, CLONE_NEWNS},
    {"mount a tmpfs", SYS_mount, P("none"), P("/tmp"), P("tmpfs")},
    {"mount: remount the root", SYS_mount, P("none"), P("/"), P("none"), 0x1000 | 0x20},
    {"umount2", SYS_umount2, P("/proc"), 2},
    {"pivot_root", SYS_pivot_root, P("/tmp"), P("/tmp")},
    {"open_tree", SYS_open_tree, AT_FDCWD, P("/"), 1},
    {"move_mount", SYS_move_mount, AT_FDCWD, P("/tmp"), AT_FDCWD, P("/tmp"), 0},
    {"fsopen", SYS_fsopen, P("tmpfs"), 0},
    {"fsconfig", SYS_fsconfig, -1},
    {"fsmount", SYS_fsmount, -1},
    {"fspick", SYS_fspick, AT_FDCWD, P("/"), 0},
    {"mount_setattr", SYS_mount_setattr, AT_FDCWD, P("/"), 0, P(zeros), 32},
    {"keyctl", SYS_keyctl, 0, -3, 1},
    {"add_key", SYS_add_key, P("user"), P("isolat"), P(zeros), 1, -3},
    {"request_key", SYS_request_key, P("user"), P("isolat"), 0, -3},
    {"ptrace another process", SYS_ptrace, 0x4206, 1},
    {"process_vm_readv", SYS_process_vm_readv, 1, P(parent_vector), 1, P(parent_vector), 1},
    {"process_vm_writev", SYS_process_vm_writev, 1, P(parent_vector), 1, P(parent_vector), 1},
    {"pidfd_getfd", SYS_pidfd_getfd, -1, 0, 0},
    {"kcmp", SYS_kcmp, 1, 1, 0, 0, 0},
    {"bpf", SYS_bpf, 0, P(zeros), 72},
    {"userfaultfd", SYS_userfaultfd, 1},
    {"perf_event_open", SYS_perf_event_open, P(perf_attributes), 0, -1, -1, 0},
    {"io_uring_setup", SYS_io_uring_setup, 4, P(zeros)},
    {"io_uring_enter", SYS_io_uring_enter, -1},
    {"io_uring_register", SYS_io_uring_register, -1},
    {"kexec_load", SYS_kexec_load, 0, 0, 0, 1L << 40},
    {"init_module", SYS_init_module, 0, 0, 0},
    {"finit_module", SYS_finit_module, -1, 0, 0},
    {"delete_module", SYS_delete_module, P("isolat-none"), 0},
    {"open_by_handle_at", SYS_open_by_handle_at, AT_FDCWD, P(zeros), 0},
    {"swapon", SYS_swapon, P("/tmp"), 0},
    {"swapoff", SYS_swapoff, P("/tmp")},
    {"reboot", SYS_reboot, 0x1234, 0x1234, 0, 0}, /* wrong magic numbers: nothing would happen */
    {"quotactl", SYS_quotactl, 0x7FFFFF00, P("/tmp"), 0, 0},
    {"acct", SYS_acct, P("/no/such/file")},
    {"settimeofday", SYS_settimeofday, P(no_time), 0},
    {"clock_settime", SYS_clock_settime, 0, P(no_time)},
    {"sethostname", SYS_sethostname, P(zeros), 1L << 20},
    {"setdomainname", SYS_setdomainname, P(zeros), 1L << 20},
    {"syslog", SYS_syslog, 3, P(room), sizeof room},
    {"fanotify_init", SYS_fanotify_init, 0, 0},
    {"move_pages", SYS_move_pages, 0, 0, 0, 0, 0},
    {"vhangup", SYS_vhangup},
    {"personality without randomness", SYS_personality, 0x0040000},
    {"mknod of a block device", SYS_mknodat, AT_FDCWD, P("/tmp/node"), S_IFBLK | 0600, 0xFE00},
    {"mknod of /dev/mem", SYS_mknodat, AT_FDCWD, P("/tmp/node"), S_IFCHR | 0600, 0x101},
#ifdef SYS_kexec_file_load
    {"kexec_file_load", SYS_kexec_file_load, -1, -1, 0, 0, 1L << 40},
#endif
#ifdef SYS_iopl
    {"iopl", SYS_iopl, 3},
    {"ioperm", SYS_ioperm, 0, 1, 1},
#endif
};

static const char *name_of(int number)
{
    static char text[16];
    switch (number) {
    case 0: return "allowed";
    case EPERM: return "EPERM";
    case ENOSYS: return "ENOSYS";
    case EACCES: return "EACCES";
    case EINVAL: return "EINVAL";
    case EFAULT: return "EFAULT";
    case EBADF: return "EBADF";
    default: snprintf(text, sizeof text, "errno %d", number); return text;
    }
}

/* In a child: what is allowed has its effect there, and what the child then is, ends. */
static int outcome(const Attempt *a)
{
    int ends[2], said = -1;
    if (pipe(ends))
        return -1;
    pid_t pid = fork();
    if (!pid) {
        errno = 0;
        int e = syscall(a->number, a->a, a->b, a->c, a->d, a->e, 0L) < 0 ? errno : 0;
        if (write(ends[1], &e, sizeof e) != sizeof e)
            _exit(1);
        kill(getpid(), SIGKILL);
    }
    close(ends[1]);
    if (read(ends[0], &said, sizeof said) != sizeof said)
        said = -1;
    close(ends[0]);
    waitpid(pid, NULL, 0);
    return said;
}

int main(void)
{
    parent_vector[0] = P(room);
    parent_vector[1] = 8;
    for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++)
        printf("%s\t%s\n", attempts[i].name, name_of(outcome(&attempts[i])));
    return 0;
}
