/* The log of one environment (rotated by rename, capped), its guest's own words, and how its MAIN ended. What is APART
   has both in a directory of its own.
   A full or vanished disk loses log records, never the application: every error here is dropped on purpose. */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int64_t file_bytes = 10 << 20;
static int file_count = 3;
static Log own = {-1, -1, 0};
static int guest_fd = -1;

static void open_newest(Log *l)
{
    struct stat st;
    l->fd = openat(l->dir, "log/0", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
    l->written = l->fd >= 0 && !fstat(l->fd, &st) ? st.st_size : 0;
}

void log_open(int64_t bytes, int files)
{
    file_bytes = bytes;
    file_count = files;
    own.dir = node.dir;
}

bool home_open(Proc *p, const char *dir)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return false;
    p->home = xalloc(sizeof *p->home);
    *p->home = (Log){fd, -1, 0};
    return true;
}

void home_close(Proc *p)
{
    if (!p->home)
        return;
    close_fd(&p->home->fd);
    close_fd(&p->home->dir);
    free(p->home);
    p->home = NULL;
}

static void rotate(Log *l)
{
    char from[24], to[24];
    close_fd(&l->fd);
    for (int i = file_count - 1; i > 0; i--) {
        snprintf(from, sizeof from, "log/%d", i - 1);
        snprintf(to, sizeof to, "log/%d", i);
        renameat(l->dir, from, l->dir, to);
    }
    if (file_count == 1)
        unlinkat(l->dir, "log/0", 0);
    open_newest(l);
}

static void put_le(uint8_t *p, uint64_t v, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = (uint8_t)(v >> (8 * i));
}

void log_write(const Proc *p, int stream, const void *data, size_t n)
{
    uint8_t head[16] = {0};
    struct iovec iov[2] = {{head, sizeof head}, {(void *)data, n}};
    Log *l = p->home ? p->home : &own;
    if (l->dir < 0)
        return;
    if (l->fd < 0) {
        mkdirat(l->dir, "log", 0750);
        open_newest(l);
    }
    if (l->written && l->written + (int64_t)(n + sizeof head) > file_bytes)
        rotate(l);
    put_le(head, (uint64_t)now_ns(), 8);
    put_le(head + 8, n, 4);
    head[12] = (uint8_t)stream;
    ssize_t w = writev(l->fd, iov, 2);
    if (w > 0 && w < (ssize_t)(n + sizeof head) && ftruncate(l->fd, l->written))
        w = 0; /* a record is whole or absent */
    else if (w == (ssize_t)(n + sizeof head))
        l->written += w;
}

void log_guest(const void *p, size_t n)
{
    if (node.dir < 0 || !n)
        return;
    if (guest_fd < 0)
        guest_fd = openat(node.dir, "guest.log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (guest_fd >= 0)
        write_all(guest_fd, p, n);
}

void log_tail(const void *p, size_t n)
{
    int fd = node.dir < 0 ? -1 : openat(node.dir, "guest.tail", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return;
    write_all(fd, p, n);
    close(fd);
}

void log_exit(const Proc *p)
{
    char text[200], code[16] = "null", signal[16] = "null";
    int dir = p->home ? p->home->dir : node.dir;
    int fd = openat(dir, "exit.json.tmp", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
    if (fd < 0)
        return;
    if (p->signal)
        snprintf(signal, sizeof signal, "%d", p->signal);
    else
        snprintf(code, sizeof code, "%d", p->code);
    int n = snprintf(text, sizeof text,
                     "{\"version\":1,\"started_ns\":%" PRId64 ",\"ended_ns\":%" PRId64 ",\"code\":%s,\"signal\":%s%s%s}\n",
                     p->started_ns, p->ended_ns, code, signal, p->with_guest ? ",\"with_guest\":true" : "",
                     p->oom ? ",\"oom\":true" : "");
    bool fine = write_all(fd, text, (size_t)n);
    close(fd);
    if (fine)
        renameat(dir, "exit.json.tmp", dir, "exit.json");
}
