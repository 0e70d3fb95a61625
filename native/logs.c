/* The log of one environment (rotated by rename, capped), its guest's own words, and how its MAIN ended.
   A full or vanished disk loses log records, never the application: every error here is dropped on purpose. */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int64_t file_bytes = 10 << 20, written;
static int file_count = 3;
static int log_fd = -1, guest_fd = -1;

static void open_newest(void)
{
    struct stat st;
    log_fd = openat(node.dir, "log/0", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
    written = log_fd >= 0 && !fstat(log_fd, &st) ? st.st_size : 0;
}

void log_open(int64_t bytes, int files)
{
    file_bytes = bytes;
    file_count = files;
}

static void rotate(void)
{
    char from[24], to[24];
    close_fd(&log_fd);
    for (int i = file_count - 1; i > 0; i--) {
        snprintf(from, sizeof from, "log/%d", i - 1);
        snprintf(to, sizeof to, "log/%d", i);
        renameat(node.dir, from, node.dir, to);
    }
    if (file_count == 1)
        unlinkat(node.dir, "log/0", 0);
    open_newest();
}

static void put_le(uint8_t *p, uint64_t v, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = (uint8_t)(v >> (8 * i));
}

void log_write(int stream, const void *p, size_t n)
{
    uint8_t head[16] = {0};
    struct iovec iov[2] = {{head, sizeof head}, {(void *)p, n}};
    if (node.dir < 0)
        return;
    if (log_fd < 0) {
        mkdirat(node.dir, "log", 0750);
        open_newest();
    }
    if (written && written + (int64_t)(n + sizeof head) > file_bytes)
        rotate();
    put_le(head, (uint64_t)now_ns(), 8);
    put_le(head + 8, n, 4);
    head[12] = (uint8_t)stream;
    ssize_t w = writev(log_fd, iov, 2);
    if (w > 0 && w < (ssize_t)(n + sizeof head) && ftruncate(log_fd, written))
        w = 0; /* a record is whole or absent */
    else if (w == (ssize_t)(n + sizeof head))
        written += w;
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
    int fd = openat(node.dir, "exit.json.tmp", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
    if (fd < 0)
        return;
    if (p->signal)
        snprintf(signal, sizeof signal, "%d", p->signal);
    else
        snprintf(code, sizeof code, "%d", p->code);
    int n = snprintf(text, sizeof text,
                     "{\"version\":1,\"started_ns\":%" PRId64 ",\"ended_ns\":%" PRId64 ",\"code\":%s,\"signal\":%s%s}\n",
                     p->started_ns, p->ended_ns, code, signal, p->with_guest ? ",\"with_guest\":true" : "");
    bool fine = write_all(fd, text, (size_t)n);
    close(fd);
    if (fine)
        renameat(node.dir, "exit.json.tmp", node.dir, "exit.json");
}
