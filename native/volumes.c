/* A machine's volumes, where they can't be shared: they come in as one archive on a disk and go out the same way.

   --unpack DEVICE DIRECTORY                   make what the archive holds below DIRECTORY
   --bind SOURCE ROOT TARGET ro|rw             show SOURCE at TARGET, as those see it whose root is ROOT
   --pack DEVICE DIRECTORY LIMIT GROUP NAME…   write an archive of DIRECTORY/NAME…, once nothing in the control
                                               group GROUP (empty: none) lives any more

   What is unpacked is stamped (DIRECTORY/stamps): of what is as it came, only the name goes out again. The first block
   of a packed archive is written last, so half an archive is none. */
#include "tar.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define STAMPS "stamps"
#define MARKER "isolat-out"
#define NS 1000000000ll
enum { SECTION_MAX = 255, GROUP_MS = 5000, BLOCK = 4096, COPY_BYTES = 64 << 10, NODE_BUCKETS = 4096 };

bool volume_complain(const char *what, const char *path)
{
    dprintf(2, "isolat-agent: %s \"%.250s\": %s\n", what, path, strerror(errno));
    return false;
}

bool volume_wrong(const char *what, const char *path, int error)
{
    errno = error;
    return volume_complain(what, path);
}

/* below a directory, never through a symbolic link */

typedef struct {
    int root, parent; /* parent: of the latest path, since the next one is mostly beside it */
    char path[TAR_PATH];
} Tree;

bool volume_section(const char *p, size_t n)
{
    return n && n <= SECTION_MAX && !(p[0] == '.' && (n == 1 || (n == 2 && p[1] == '.')));
}

static int down(int fd, const char *path, size_t n)
{
    for (const char *at = path; fd >= 0 && at < path + n;) {
        char name[SECTION_MAX + 1];
        size_t m = strcspn(at, "/");
        int next = -1, e = EINVAL;
        if (volume_section(at, m)) {
            memcpy(name, at, m);
            name[m] = 0;
            next = openat(fd, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            e = errno;
        }
        close(fd);
        fd = next;
        errno = e;
        at += m + 1;
    }
    return fd;
}

/* The directory that the path's last component is in; it stays the tree's. -1 with errno. */
static int parent_of(Tree *t, const char *path, const char **last)
{
    const char *slash = strrchr(path, '/');
    size_t n = slash ? (size_t)(slash - path) : 0;
    *last = slash ? slash + 1 : path;
    if (slash == path || !volume_section(*last, strlen(*last))) {
        errno = EINVAL;
        return -1;
    }
    if (t->parent >= 0 && strlen(t->path) == n && !memcmp(t->path, path, n))
        return t->parent;
    close_fd(&t->parent);
    t->parent = down(fcntl(t->root, F_DUPFD_CLOEXEC, 3), path, n);
    memcpy(t->path, path, n);
    t->path[n] = 0;
    return t->parent;
}

/* unpacking */

typedef struct Late {
    struct Late *next; /* the one before: what is deeper comes first */
    unsigned mode;
    uint32_t uid, gid;
    struct timespec times[2];
    char path[];
} Late;

/* Owners are root's to give; anybody else (tests) keeps what they make. */
static bool owned(int result) { return !result || (errno == EPERM && geteuid()); }

static void times_of(const Entry *e, struct timespec times[2])
{
    struct timespec t = {.tv_sec = (time_t)e->mtime_s, .tv_nsec = (long)e->mtime_ns};
    times[0] = t;
    times[1] = t;
}

static bool finish_fd(int fd, unsigned mode, uint32_t uid, uint32_t gid, const struct timespec times[2])
{
    return owned(fchown(fd, uid, gid)) && !fchmod(fd, mode) && !futimens(fd, times);
}

static bool all_zero(const uint8_t *p, size_t n) { return !*p && (n == 1 || !memcmp(p, p + 1, n - 1)); }

static size_t in_block(uint64_t offset, size_t n)
{
    size_t left = BLOCK - (size_t)(offset & (BLOCK - 1));
    return left < n ? left : n;
}

static bool write_at(int fd, const uint8_t *p, size_t n, uint64_t offset)
{
    while (n) {
        ssize_t done = pwrite(fd, p, n, (off_t)offset);
        if (done <= 0)
            return false;
        p += done;
        n -= (size_t)done;
        offset += (uint64_t)done;
    }
    return true;
}

/* Holes where there is nothing but zeros. */
static bool put_data(int fd, const uint8_t *p, size_t n, uint64_t *offset)
{
    while (n) {
        size_t some = in_block(*offset, n);
        if (!all_zero(p, some)) {
            for (size_t more; some < n; some += more)
                if (all_zero(p + some, more = in_block(*offset + some, n - some)))
                    break;
            if (!write_at(fd, p, some, *offset))
                return false;
        }
        p += some;
        n -= some;
        *offset += some;
    }
    return true;
}

static bool fill(Tape *t, int fd, uint64_t size)
{
    uint64_t offset = 0;
    while (offset < size) {
        size_t n;
        const uint8_t *p = tape_read(t, size - offset < TAR_CHUNK ? (size_t)(size - offset) : TAR_CHUNK, &n);
        if (!p || !put_data(fd, p, n, &offset))
            return false;
    }
    return !ftruncate(fd, (off_t)size) && tar_skip(t, -size & (TAR_BLOCK - 1));
}

static bool make_file(Tape *t, const Entry *e, int dir, const char *name)
{
    struct timespec times[2];
    int fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    times_of(e, times);
    bool fine = fd >= 0 && fill(t, fd, e->size) && finish_fd(fd, e->mode, e->uid, e->gid, times);
    int error = errno;
    close_fd(&fd);
    errno = error;
    return fine;
}

static bool make_directory(Late **late, const Entry *e, int dir, const char *name)
{
    struct stat st;
    if (mkdirat(dir, name, 0700) &&
        (errno != EEXIST || fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) || !S_ISDIR(st.st_mode)))
        return false;
    Late *l = xalloc(sizeof *l + strlen(e->path) + 1);
    *l = (Late){.next = *late, .mode = e->mode, .uid = e->uid, .gid = e->gid};
    times_of(e, l->times);
    strcpy(l->path, e->path);
    *late = l;
    return true;
}

static bool make_link(Tree *tree, const Entry *e, int dir, const char *name)
{
    const char *last;
    int own = fcntl(dir, F_DUPFD_CLOEXEC, 3), from = parent_of(tree, e->target, &last);
    bool fine = own >= 0 && from >= 0 && !linkat(from, last, own, name, 0);
    int error = errno;
    close_fd(&own);
    errno = error;
    return fine;
}

/* What is neither file nor directory; FIFOs and symbolic links have no descriptor that owners could be set through. */
static bool make_node(const Entry *e, int dir, const char *name)
{
    struct timespec times[2];
    bool link = e->type == '2';
    times_of(e, times);
    return !(link ? symlinkat(e->target, dir, name) : mkfifoat(dir, name, 0600)) &&
           owned(fchownat(dir, name, e->uid, e->gid, AT_SYMLINK_NOFOLLOW)) && (link || !fchmodat(dir, name, e->mode, 0)) &&
           !utimensat(dir, name, times, AT_SYMLINK_NOFOLLOW);
}

static bool unpack_one(Tape *t, Tree *tree, Late **late, Entry *e)
{
    const char *name;
    for (size_t n = strlen(e->path); n > 1 && e->path[n - 1] == '/'; n--)
        e->path[n - 1] = 0;
    int dir = parent_of(tree, e->path, &name);
    if (dir < 0)
        return volume_complain("unpacking", e->path);
    bool fine = false;
    switch (e->type) {
    case '0': fine = make_file(t, e, dir, name); break;
    case '1': fine = make_link(tree, e, dir, name); break;
    case '5': fine = make_directory(late, e, dir, name); break;
    case '2':
    case '6': fine = make_node(e, dir, name); break;
    default: errno = EINVAL;
    }
    return fine || volume_complain("unpacking", e->path);
}

/* Owners, modes and times of directories, once nothing is put into them any more. */
static bool finish_directories(Tree *tree, Late *late)
{
    for (Late *l = late; l; l = l->next) {
        const char *name;
        int dir = parent_of(tree, l->path, &name);
        int fd = dir < 0 ? -1 : openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        bool fine = fd >= 0 && finish_fd(fd, l->mode, l->uid, l->gid, l->times);
        if (!fine)
            return volume_complain("finishing", l->path);
        close(fd);
    }
    return true;
}

/* walking */

typedef bool (*Visit)(int dir, const char *name, const struct stat *st);

static char walked[TAR_PATH]; /* the path of what is visited */

static bool walk(int dir, const char *name, size_t at, Visit visit);

static bool walk_into(DIR *d, size_t at, Visit visit)
{
    for (struct dirent *e; (errno = 0, e = readdir(d));) {
        size_t n = strlen(e->d_name);
        if (!volume_section(e->d_name, n))
            continue;
        if (at + n + 2 > TAR_PATH)
            return volume_wrong("too deep", walked, ENAMETOOLONG);
        walked[at] = '/';
        memcpy(walked + at + 1, e->d_name, n + 1);
        if (!walk(dirfd(d), e->d_name, at + 1 + n, visit))
            return false;
        walked[at] = 0;
    }
    return !errno || volume_complain("reading", walked);
}

static bool walk(int dir, const char *name, size_t at, Visit visit)
{
    struct stat st;
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW))
        return volume_complain("looking at", walked);
    if (!visit(dir, name, &st))
        return false;
    if (!S_ISDIR(st.st_mode))
        return true;
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d)
        return volume_complain("opening", walked);
    bool fine = walk_into(d, at, visit);
    closedir(d);
    return fine;
}

static bool walk_from(int dir, const char *name, Visit visit)
{
    if (!volume_section(name, strlen(name)))
        return volume_wrong("no volume", name, EINVAL);
    strcpy(walked, name);
    return walk(dir, name, strlen(name), visit);
}

static void many_descriptors(void)
{
    struct rlimit most;
    if (!getrlimit(RLIMIT_NOFILE, &most)) { /* one is open for each level of a tree */
        most.rlim_cur = most.rlim_max;
        setrlimit(RLIMIT_NOFILE, &most);
    }
}

/* stamps: whatever is done to a file changes its ctime (inode(7)), also when its clock and its mtime are turned back */

typedef struct {
    uint64_t path, inode;
    int64_t changed_ns;
} Stamp;

static FILE *stamping;
static Stamp *stamps;
static size_t nstamps;

/* FNV-1a */
static uint64_t hash(const char *text)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (; *text; text++)
        h = (h ^ (uint8_t)*text) * 0x100000001b3u;
    return h;
}

static Stamp stamp_of(const struct stat *st)
{
    return (Stamp){hash(walked), st->st_ino, st->st_ctim.tv_sec * NS + st->st_ctim.tv_nsec};
}

static bool put_stamp(int dir, const char *name, const struct stat *st)
{
    (void)dir, (void)name;
    Stamp s = stamp_of(st);
    return S_ISDIR(st->st_mode) || fwrite(&s, sizeof s, 1, stamping) == 1;
}

static bool stamp_all(int root)
{
    int fd = openat(root, STAMPS, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    DIR *d = fdopendir(openat(root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    bool fine = fd >= 0 && d && (stamping = fdopen(fd, "w"));
    for (struct dirent *e; fine && (e = readdir(d));)
        if (e->d_name[0] != '.' && strcmp(e->d_name, STAMPS) != 0)
            fine = walk_from(root, e->d_name, put_stamp);
    if (stamping)
        fine = !fclose(stamping) && fine;
    if (d)
        closedir(d);
    return fine || volume_complain("stamping", STAMPS);
}

static int by_path(const void *a, const void *b)
{
    const Stamp *x = a, *y = b;
    return (x->path > y->path) - (x->path < y->path);
}

/* Without stamps everything counts as changed. */
static void load_stamps(int root)
{
    struct stat st;
    int fd = openat(root, STAMPS, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) || !(stamps = malloc((size_t)st.st_size + 1))) {
        close_fd(&fd);
        return;
    }
    ssize_t n = read(fd, stamps, (size_t)st.st_size);
    nstamps = n > 0 ? (size_t)n / sizeof *stamps : 0;
    close(fd);
    qsort(stamps, nstamps, sizeof *stamps, by_path);
}

static bool as_it_came(const struct stat *st)
{
    Stamp now = stamp_of(st);
    const Stamp *s = nstamps ? bsearch(&now, stamps, nstamps, sizeof now, by_path) : NULL;
    return s && s->inode == now.inode && s->changed_ns == now.changed_ns;
}

static int unpack(const char *device, const char *directory)
{
    static Entry e;
    Tape t;
    Late *late = NULL;
    int found = -1;
    if (mkdir_p(directory, 0700) || !tape_open(&t, device, false, 0))
        return volume_complain("opening", device), 1;
    Tree tree = {.root = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC), .parent = -1};
    umask(0);
    while (tree.root >= 0 && (found = tar_read(&t, &e)) > 0)
        if (!unpack_one(&t, &tree, &late, &e))
            return 1;
    if (found < 0)
        return volume_complain("this is no whole archive:", device), 1;
    close_fd(&tree.parent);
    return finish_directories(&tree, late) && stamp_all(tree.root) ? 0 : 1;
}

/* packing */

typedef struct Name {
    struct Name *next;
    uint64_t inode;
    char path[];
} Name;

static Tape tape;
static Name *names[NODE_BUCKETS]; /* of files that have several, by inode */

static const char *known_as(uint64_t inode)
{
    for (Name *n = names[inode % NODE_BUCKETS]; n; n = n->next)
        if (n->inode == inode)
            return n->path;
    Name *n = xalloc(sizeof *n + strlen(walked) + 1);
    n->inode = inode;
    strcpy(n->path, walked);
    n->next = names[inode % NODE_BUCKETS];
    names[inode % NODE_BUCKETS] = n;
    return NULL;
}

static char type_of(mode_t mode)
{
    return S_ISREG(mode) ? '0' : S_ISDIR(mode) ? '5' : S_ISLNK(mode) ? '2' : S_ISFIFO(mode) ? '6' : 0;
}

/* Exactly so many bytes, whatever happens to the file meanwhile. */
static bool put_content(int fd, uint64_t size)
{
    static uint8_t chunk[COPY_BYTES];
    for (uint64_t left = size; left;) {
        size_t most = left < sizeof chunk ? (size_t)left : sizeof chunk;
        ssize_t n = fd < 0 ? 0 : read(fd, chunk, most);
        if (n < 0)
            return false;
        if (n == 0) {
            memset(chunk, 0, most);
            n = (ssize_t)most;
        }
        if (!tape_write(&tape, chunk, (size_t)n))
            return false;
        left -= (uint64_t)n;
    }
    return tar_pad(&tape, size);
}

static bool pack_file(int dir, const char *name, Entry *e)
{
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    bool fine = fd >= 0 && tar_write(&tape, e) && put_content(fd, e->size);
    int error = errno;
    close_fd(&fd);
    errno = error;
    return fine || volume_complain("packing", walked);
}

static bool pack_one(int dir, const char *name, const struct stat *st)
{
    static Entry e;
    const char *other = !S_ISDIR(st->st_mode) && st->st_nlink > 1 ? known_as(st->st_ino) : NULL;
    memset(&e, 0, sizeof e);
    e.type = other ? '1' : type_of(st->st_mode);
    if (!e.type)
        return dprintf(2, "isolat-agent: \"%.250s\" is left out: it is a device or a socket\n", walked), true;
    strcpy(e.path, walked);
    if (other)
        strcpy(e.target, other);
    else if (e.type == '2' && readlinkat(dir, name, e.target, sizeof e.target - 1) < 0)
        return volume_complain("reading", walked);
    e.mode = st->st_mode & 07777;
    e.uid = st->st_uid;
    e.gid = st->st_gid;
    e.mtime_s = st->st_mtim.tv_sec;
    e.mtime_ns = st->st_mtim.tv_nsec;
    e.same = e.type != '5' && as_it_came(st);
    e.size = e.type == '0' && !e.same ? (uint64_t)st->st_size : 0;
    if (e.size)
        return pack_file(dir, name, &e);
    return tar_write(&tape, &e) || volume_complain("packing", walked);
}

static bool first_block(bool marker)
{
    static const uint8_t zero[TAR_BLOCK];
    tape.offset = 0;
    return (marker ? tar_mark(&tape, MARKER) : tape_write(&tape, zero, sizeof zero)) && tape_flush(&tape);
}

static bool empty_group(const char *path)
{
    char events[256];
    return read_small(path, events, sizeof events) <= 0 || strstr(events, "populated 0");
}

/* What runs on while it is packed would be packed half. */
static void end_group(const char *group)
{
    char path[512];
    snprintf(path, sizeof path, "%s/cgroup.kill", group);
    if (!*group || !write_file(path, "1"))
        return;
    snprintf(path, sizeof path, "%s/cgroup.events", group);
    for (int64_t end = ticks_ms() + GROUP_MS; !empty_group(path) && ticks_ms() < end;)
        sleep_ms(1);
}

static int pack(const char *device, const char *directory, uint64_t limit, char **volumes)
{
    int root = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0 || !tape_open(&tape, device, true, limit) || !first_block(false))
        return volume_complain("opening", device), 1;
    load_stamps(root);
    for (; *volumes; volumes++)
        if (!walk_from(root, *volumes, pack_one))
            return 1;
    if (!tar_finish(&tape) || !first_block(true) || fsync(tape.fd))
        return volume_complain("writing", device), 1;
    return 0;
}

int volumes_main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    many_descriptors();
    if (!strcmp(how, "--unpack") && argc == 4)
        return unpack(argv[2], argv[3]);
    if (!strcmp(how, "--bind") && argc == 6)
        return volume_bind(argv[2], argv[3], argv[4], !strcmp(argv[5], "ro"));
    if (!strcmp(how, "--pack") && argc >= 6) {
        end_group(argv[5]);
        return pack(argv[2], argv[3], strtoull(argv[4], NULL, 10), argv + 6);
    }
    return -1;
}
