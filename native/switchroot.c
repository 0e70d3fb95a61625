/*
 * From an initrd to the root on a disk: load the modules, wait for the device, mount it, become its init.
 *
 * /switch-root holds one line: DEVICE FSTYPE OPTIONS INIT. The modules are in /modules, in the order of /modules/order.
 * What it does and in which order is that of switch_root(8): the new root is moved onto / (pivot_root can't leave the
 * first root file system), after the files here were removed, which are memory that would stay.
 */
#include "switchroot.h"

#include "base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROOT "/root"

enum { WAIT_MS = 20000, STEP_MS = 10, PLAN_BYTES = 1024, ORDER_BYTES = 16 << 10 };

typedef struct {
    char *device, *type, *options, *init;
} Plan;

static void must(bool done, const char *what)
{
    if (done)
        return;
    dprintf(2, "isolat: switching the root: %s: %s\n", what, strerror(errno));
    _exit(70);
}

static Plan read_plan(char *text)
{
    Plan p;
    char *rest;
    p.device = strtok_r(text, " \n", &rest);
    p.type = strtok_r(NULL, " \n", &rest);
    p.options = strtok_r(NULL, " \n", &rest);
    p.init = strtok_r(NULL, " \n", &rest);
    errno = EINVAL;
    must(p.init != NULL, "/switch-root");
    return p;
}

static void load_module(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "/modules/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
        dprintf(2, "isolat: the module %s: %s\n", name, strerror(errno));
    if (fd >= 0)
        close(fd);
    unlink(path);
}

static void load_modules(void)
{
    char text[ORDER_BYTES], *rest;
    if (read_small("/modules/order", text, sizeof text) < 0)
        return;
    for (char *name = strtok_r(text, "\n", &rest); name; name = strtok_r(NULL, "\n", &rest))
        load_module(name);
    unlink("/modules/order");
    rmdir("/modules");
}

/* A disk is found in its own time, also after its driver has been loaded. */
static void mount_root(const Plan *p)
{
    const char *options = strcmp(p->options, "-") ? p->options : NULL;
    int64_t until = ticks_ms() + WAIT_MS;
    while (mount(p->device, ROOT, p->type, MS_NOATIME, options)) {
        must((errno == ENOENT || errno == ENXIO) && ticks_ms() < until, p->device);
        sleep_ms(STEP_MS);
    }
}

static void enter_root(void)
{
    must(!mount("/dev", ROOT "/dev", NULL, MS_MOVE, NULL), "moving /dev");
    must(!chdir(ROOT) && !mount(".", "/", NULL, MS_MOVE, NULL), "moving the root");
    must(!chroot(".") && !chdir("/"), "entering the root");
}

void switch_root(void)
{
    char text[PLAN_BYTES];
    if (read_small("/switch-root", text, sizeof text) < 0)
        return;
    Plan p = read_plan(text);
    mkdir("/dev", 0755);
    mkdir(ROOT, 0700);
    must(!mount("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=0755"), "/dev");
    load_modules();
    mount_root(&p);
    unlink("/switch-root");
    unlink("/init");
    enter_root();
    char *argv[] = {p.init, NULL}, *env[] = {"TERM=linux", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    execve(p.init, argv, env);
    must(false, p.init);
}
