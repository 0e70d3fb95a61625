/* READ and WRITE of regular files, and the removal of trees. */
#include "node.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { READ_MAX = 256 << 10, DEPTH_MAX = 24 };

/* O_NONBLOCK: a FIFO or a device in the place of a file must not hold us. */
static int open_regular(const char *path, int flags, mode_t mode, struct stat *st)
{
    int fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, mode);
    if (fd < 0 || fstat(fd, st))
        return -1;
    if (S_ISREG(st->st_mode))
        return fd;
    close(fd);
    errno = S_ISDIR(st->st_mode) ? EISDIR : EINVAL;
    return -1;
}

static void file_error(Peer *who, const Frame *f, const char *stage, const char *path)
{
    char message[320];
    int e = errno;
    snprintf(message, sizeof message, "%s: \"%.200s\": %s", stage, path, strerror(e));
    reply_error(who, f->id, stage, e, message);
}

void file_read(Peer *who, const Frame *f)
{
    struct stat st;
    Buf body = {0};
    const char *path = field_text(f->body, T_PATH);
    int64_t offset = field_int(f->body, T_OFFSET, 0), count = field_int(f->body, T_COUNT, READ_MAX);
    if (offset < 0 || count < 0 || count > READ_MAX) {
        reply_error(who, f->id, "read", EINVAL, "read: OFFSET or COUNT is out of bounds");
        return;
    }
    int fd = open_regular(path, O_RDONLY, 0, &st);
    uint8_t *into = request_alloc((size_t)count);
    ssize_t n = fd < 0 ? -1 : pread(fd, into, (size_t)count, offset);
    if (n < 0) {
        file_error(who, f, "read", path);
    } else {
        put_bytes(&body, T_DATA, into, (size_t)n);
        put_int(&body, T_SIZE, st.st_size);
        peer_reply(who, K_OK, f->id, &body);
    }
    close_fd(&fd);
}

static bool write_at(int fd, Span data, int64_t offset)
{
    while (data.n) {
        ssize_t w = pwrite(fd, data.p, data.n, offset);
        if (w <= 0)
            return false;
        data.p += w;
        data.n -= (size_t)w;
        offset += w;
    }
    return true;
}

void file_write(Peer *who, const Frame *f)
{
    struct stat st;
    Span data = {0};
    const char *path = field_text(f->body, T_PATH);
    int64_t offset = field_int(f->body, T_OFFSET, 0);
    bool truncate = field_int(f->body, T_FLAGS, 0) & F_TRUNCATE;
    field_find(f->body, T_DATA, &data);
    int fd = open_regular(path, O_WRONLY | O_CREAT, (mode_t)field_int(f->body, T_MODE, 0644) & 07777, &st);
    if (fd < 0 || offset < 0 || (truncate && ftruncate(fd, 0)) || !write_at(fd, data, offset))
        file_error(who, f, "write", path);
    else
        reply_ok(who, f->id);
    close_fd(&fd);
}

static bool remove_entry(int dirfd, const char *name, int top, int depth);

/* A tree deeper than this is cut: the rest moves up to the top, under a name that no one else has. */
static bool lift(int dirfd, const char *name, int top)
{
    static unsigned number;
    char to[48];
    snprintf(to, sizeof to, ".isolat-removed-%d-%u", getpid(), number++);
    return !renameat(dirfd, name, top, to);
}

static bool remove_children(int fd, int top, int depth)
{
    struct dirent *e;
    bool fine = true;
    DIR *d = fdopendir(openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)); /* with a position of its own */
    if (!d)
        return false;
    while ((e = readdir(d)))
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            fine &= remove_entry(fd, e->d_name, top, depth);
    int error = errno;
    closedir(d);
    errno = error;
    return fine;
}

static bool remove_directory(int dirfd, const char *name, int top, int depth)
{
    struct stat outer, inner;
    int fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT;
    /* never into another file system, nor into a bind mount of the same one */
    bool crossing = is_mount_root(dirfd, name) || fstat(dirfd, &outer) || fstat(fd, &inner) || outer.st_dev != inner.st_dev;
    bool fine = !crossing && remove_children(fd, top < 0 ? fd : top, depth + 1);
    /* what was lifted into the top appeared behind the reader's back */
    for (int i = 0; fine && top < 0 && i < 4096 && unlinkat(dirfd, name, AT_REMOVEDIR) && errno == ENOTEMPTY; i++)
        fine = remove_children(fd, fd, depth + 1);
    int error = crossing ? EBUSY : errno;
    close(fd);
    errno = error;
    return fine;
}

static bool remove_entry(int dirfd, const char *name, int top, int depth)
{
    if (!unlinkat(dirfd, name, 0) || errno == ENOENT)
        return true;
    if (errno != EISDIR && errno != EPERM)
        return false;
    if (depth >= DEPTH_MAX)
        return lift(dirfd, name, top);
    if (!remove_directory(dirfd, name, top, depth))
        return false;
    return !unlinkat(dirfd, name, AT_REMOVEDIR) || errno == ENOENT;
}

bool remove_tree(const char *path)
{
    const char *slash = strrchr(path, '/');
    int parent = open(request_text((Span){(const uint8_t *)path, (size_t)(slash - path)}),
                      O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (parent < 0)
        return false;
    bool fine = remove_entry(parent, slash + 1, -1, 0);
    int e = errno;
    close(parent);
    errno = e;
    return fine;
}
