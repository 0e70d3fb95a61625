/* isolat-agent: holds the processes of a machine, for the keeper at the other end of its port. docs/protocol.md

   as PID 1          of an initramfs: makes the machine's root, then serves the port
   --service         a service of a whole operating system
   --fd 3            an ordinary process, its controller on descriptor 3 (tests)
   --tsc-khz         print how fast this machine's time stamp counter runs
   --nothing, --ahead: what only warms up (ahead.c)
   --unpack, --bind, --pack: a machine's volumes (volumes.c)
   --copy-out, --copy-in, --layer, --changes: an environment's files (copy.c, layer.c) */
#include "machine.h"

#include "copy.h"
#include "switchroot.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { CONTROL_FD = 3, EXIT_USAGE = 64 };

static void quiet_stdin(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null >= 0)
        dup2(null, 0);
    if (null > 0)
        close(null);
}

static void serve(int fd)
{
    node.role = "agent";
    node.holds = true;
    node.after = true;
    node.on_machine = machine_request;
    node.on_spawn = exercise_learn;
    node.on_turn = exercise_turn;
    node.lacked_memory = machine_is_ours ? lacked_memory : NULL;
    prctl(PR_SET_DUMPABLE, 0); /* what runs beside us may be root: it shall not look into us */
    if (!node.pid1)
        prctl(PR_SET_CHILD_SUBREAPER, 1);
    node_open();
    fd = move_high(fd);
    if (fd < 0 || fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK))
        die("agent");
    controller_new_serial(fd);
    node_run();
}

int main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    if (getpid() == 1) {
        switch_root(); /* comes back where this is no whole operating system's initrd */
        node.pid1 = true;
        serve(boot_as_pid1());
    } else if (!strcmp(how, "--tsc-khz")) {
        return print_tsc_khz();
    } else if (!strcmp(how, "--service")) {
        quiet_stdin();
        serve(boot_service_port());
    } else if (!strcmp(how, "--fd") && argc == 3 && !strcmp(argv[2], "3")) {
        quiet_stdin();
        serve(CONTROL_FD);
    } else {
        int (*const programs[])(int, char **) = {volumes_main, copy_main, layer_main, ahead_main};
        for (size_t i = 0; i < LEN(programs); i++) {
            int code = programs[i](argc, argv);
            if (code >= 0)
                return code;
        }
        dprintf(2, "usage: isolat-agent --service | --fd 3 | --tsc-khz | --nothing | --ahead | --unpack | --bind | --pack |"
                   " --copy-out | --copy-in | --layer | --changes (or as PID 1 of a machine)\n");
        return EXIT_USAGE;
    }
    return 0;
}
