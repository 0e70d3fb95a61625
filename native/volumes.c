/* A machine's volumes, where they can't be shared: they come in as one archive on a disk and go out the same way.

   --unpack DEVICE DIRECTORY                   make what the archive holds below DIRECTORY
   --bind SOURCE ROOT TARGET ro|rw             show SOURCE at TARGET, as those see it whose root is ROOT
   --pack DEVICE DIRECTORY LIMIT GROUP NAME…   write an archive of DIRECTORY/NAME…, once nothing in the control
                                               group GROUP (empty: none) lives any more

   --flush DIRECTORY [WORD…]                   do what WORD… says, then write to the disk what is still in memory

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
enum { GROUP_MS = 5000 };

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

static Walk put_stamp(int dir, const char *name, const struct stat *st)
{
    (void)dir, (void)name;
    Stamp s = stamp_of(st);
    return S_ISDIR(st->st_mode) || fwrite(&s, sizeof s, 1, stamping) == 1 ? WALK_INTO : WALK_STOP;
}

static bool walk_from(int dir, const char *name, Visit visit)
{
    if (!volume_section(name, strlen(name)))
        return volume_wrong("no volume", name, EINVAL);
    return tree_walk(dir, name, name, visit);
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
    int found = -1;
    if (mkdir_p(directory, 0700) || !tape_open(&t, device, false, 0))
        return volume_complain("opening", device), 1;
    Tree tree = {.root = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC), .parent = -1, .owners = true};
    umask(0);
    while (tree.root >= 0 && (found = tar_read(&t, &e)) > 0)
        if (!unpack_one(&t, &tree, &e))
            return 1;
    if (found < 0)
        return volume_complain("this is no whole archive:", device), 1;
    return unpack_finish(&tree) && stamp_all(tree.root) ? 0 : 1;
}

/* packing */

static Tape tape;

static bool pack_file(int dir, const char *name, Entry *e, const struct stat *st)
{
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    bool fine = fd >= 0 && tar_put(&tape, e, fd, (uint64_t)st->st_size, false);
    int error = errno;
    close_fd(&fd);
    errno = error;
    return fine;
}

static Walk pack_one(int dir, const char *name, const struct stat *st)
{
    static Entry e;
    bool fine = tree_entry(&e, dir, name, st);
    if (fine && (!e.type || e.type == '3' || e.type == '4')) {
        dprintf(2, "isolat-agent: \"%.250s\" is left out: it is a device or a socket\n", walked);
        return WALK_OVER;
    }
    e.same = e.type != '5' && as_it_came(st);
    if (fine)
        fine = e.type == '0' && !e.same && st->st_size ? pack_file(dir, name, &e, st) : tar_write(&tape, &e);
    if (fine)
        tree_remember(st);
    return fine || volume_complain("packing", walked) ? WALK_INTO : WALK_STOP;
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

static int flush(const char *directory, int argc, char **argv)
{
    int code = argc > 1 ? volumes_main(argc, argv) : 0, fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || syncfs(fd))
        return volume_complain("writing", directory), 1;
    close(fd);
    return code;
}

int volumes_main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    many_descriptors();
    if (!strcmp(how, "--flush") && argc > 2)
        return flush(argv[2], argc - 2, argv + 2);
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
