/* isolat-init: the first process inside, its controller on descriptor 3. docs/protocol.md

   --copy-out, --copy-in: a process inside that reads or writes files for somebody outside (copy.c) */
#include "node.h"

#include "copy.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CONTROL_FD = 3 };

static void quiet_stdio(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int i = 0; i < 3; i++)
        if (null >= 0 && i < 2)
            dup2(null, i);
    if (null > 2)
        close(null);
}

static void say_hello(Peer *controller)
{
    Buf body = {0};
    put_int(&body, T_VERSION, WIRE_VERSION);
    put_text(&body, T_ROLE, node.role);
    put_int(&body, T_PID, getpid());
    peer_reply(controller, K_HELLO, 0, &body);
}

int main(int argc, char **argv)
{
    int type, code = copy_main(argc, argv);
    socklen_t n = sizeof type;
    if (code >= 0)
        return code;
    if (getsockopt(CONTROL_FD, SOL_SOCKET, SO_TYPE, &type, &n) || type != SOCK_STREAM) {
        dprintf(2, "isolat-init: descriptor 3 is no controller\n");
        return 64;
    }
    node.role = "init";
    node.pid1 = getpid() == 1;
    prctl(PR_SET_DUMPABLE, 0); /* what runs inside may be root there: it shall not look into us */
    if (!node.pid1)
        prctl(PR_SET_CHILD_SUBREAPER, 1);
    quiet_stdio();
    node_open();
    int fd = move_high(CONTROL_FD);
    if (fd < 0 || chdir("/"))
        die("init");
    say_hello(controller_new(fd));
    node_run();
    return 0;
}
