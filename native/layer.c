/* --layer [OPTION…] UPPER LOWER      write the writable part of an overlay to standard output, as a layer of an image
   --changes [OPTION…] UPPER LOWER    write what is changed there: A (added), C (changed) or D (deleted), path, NUL

   --shift FIRST     what inside is 0 has this id here
   --freeze FILE     freezer.state or cgroup.freeze of those who write there: they stand still meanwhile
   --own PATH        what was put there from outside, with all that is in it
   --mount PATH      what only is there so that something can be mounted on it, with the directories that lead to it

   Whiteouts and opaque directories become those of a layer (image-spec layer.md; the kernel's overlayfs.rst). Names are
   looked up in their directory and never followed, but who writes there may still exchange them: without --freeze it
   is one after the other, as it is found. */
#include "copy.h"

#include "beneath.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { PATHS_MAX = 256, FREEZE_MS = 10000, ATTRIBUTE_NAMES = 64 << 10, ATTRIBUTE_BYTES = 64 << 10 };
#define WHITEOUT ".wh."
#define OPAQUE_MARK ".wh..wh..opq"

static bool listing; /* --changes */
static uint32_t shift;
static const char *own[PATHS_MAX], *mounts[PATHS_MAX];
static size_t nown, nmounts, told;
static char path[TAR_PATH];
static Tape tape;

static bool left_out(const char *why)
{
    dprintf(2, "left out: \"%.250s\": %s\n", path, why);
    return true;
}

static bool failed(const char *what) { return volume_complain(what, path); }

static bool is_own(void)
{
    for (size_t i = 0; i < nown; i++)
        if (!strcmp(own[i], path))
            return true;
    return false;
}

/* what stands in the way of the walk */

static bool whiteout(const struct stat *st) { return S_ISCHR(st->st_mode) && !st->st_rdev; }

static bool has(int fd, const char *name)
{
    char value[16];
    return fgetxattr(fd, name, value, sizeof value) >= 0 || errno == ERANGE;
}

static bool opaque(int fd)
{
    char value[4];
    return fgetxattr(fd, "trusted.overlay.opaque", value, sizeof value) == 1 && *value == 'y';
}

static bool moved(int fd) { return has(fd, "trusted.overlay.redirect") || has(fd, "trusted.overlay.metacopy"); }

/* Nothing but the way to one of the mount points, which is empty. `rest`: of that one's path, below this. */
static bool leads_to(int dir, const char *name, const char *rest)
{
    struct stat st;
    char next[256];
    size_t n = strcspn(rest, "/");
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW))
        return false;
    if (!S_ISDIR(st.st_mode))
        return !*rest && S_ISREG(st.st_mode) && !st.st_size;
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    char **names = fd < 0 ? NULL : tree_names(fd);
    bool fine = names && (*rest ? n < sizeof next && names[0] && !names[1] : !names[0]);
    if (fine && *rest) {
        memcpy(next, rest, n);
        next[n] = 0;
        fine = !strcmp(names[0], next) && leads_to(fd, next, rest[n] ? rest + n + 1 : rest + n);
    }
    tree_free(names);
    close_fd(&fd);
    return fine;
}

static bool for_mount(int dir, const char *name)
{
    size_t n = strlen(path);
    for (size_t i = 0; i < nmounts; i++)
        if (!strncmp(mounts[i], path, n) && (!mounts[i][n] || mounts[i][n] == '/') &&
            leads_to(dir, name, mounts[i][n] ? mounts[i] + n + 1 : ""))
            return true;
    return false;
}

/* what is said of it */

static bool tell(char kind)
{
    told++;
    return !listing || (tape_write(&tape, &kind, 1) && tape_write(&tape, path, strlen(path) + 1));
}

static bool put_name(const char *directory, const char *name, const struct stat *st)
{
    static Entry e;
    memset(&e, 0, sizeof e);
    e.type = '0';
    e.mode = 0600;
    e.mtime_s = st->st_mtim.tv_sec;
    if (snprintf(e.path, sizeof e.path, "%s%s%s", directory, *directory ? "/" : "", name) >= (int)sizeof e.path)
        return volume_wrong("too long", path, ENAMETOOLONG);
    return tar_write(&tape, &e) || failed("writing");
}

static bool put_whiteout(const char *name, const struct stat *st)
{
    char marked[300], directory[TAR_PATH];
    snprintf(marked, sizeof marked, WHITEOUT "%s", name);
    size_t n = strlen(path) - strlen(name);
    memcpy(directory, path, n);
    directory[n ? n - 1 : 0] = 0;
    return put_name(directory, marked, st);
}

/* A capability that counts for root inside counts for root: capabilities(7), "Namespaced file capabilities". */
static size_t plain_capability(uint8_t *value, size_t n)
{
    uint32_t magic, root;
    memcpy(&magic, value, sizeof magic);
    if (n != 24 || (magic & 0xff000000u) != 0x03000000u)
        return n;
    memcpy(&root, value + 20, sizeof root);
    if (root != shift)
        return n;
    magic = 0x02000000u | (magic & 1);
    memcpy(value, &magic, sizeof magic);
    return 20;
}

/* linux/posix_acl_xattr.h: a version, then tag, rights and id of each; ids only of named users and groups. */
static void plain_acl(uint8_t *value, size_t n)
{
    for (size_t at = 4; at + 8 <= n; at += 8) {
        uint16_t tag;
        uint32_t id;
        memcpy(&tag, value + at, sizeof tag);
        memcpy(&id, value + at + 4, sizeof id);
        id -= tag == 2 || tag == 8 ? shift : 0;
        memcpy(value + at + 4, &id, sizeof id);
    }
}

static bool kept(const char *name)
{
    return strncmp(name, "trusted.overlay.", 16) != 0 && strncmp(name, "user.overlay.", 13) != 0 &&
           strcmp(name, "security.selinux") != 0;
}

static void attributes(int fd, Buf *records)
{
    static char names[ATTRIBUTE_NAMES];
    static uint8_t value[ATTRIBUTE_BYTES];
    ssize_t n = flistxattr(fd, names, sizeof names), m;
    for (const char *at = names; n > 0 && at < names + n; at += strlen(at) + 1) {
        if (!kept(at) || (m = fgetxattr(fd, at, value, sizeof value)) < 0)
            continue;
        size_t size = (size_t)m;
        if (!strcmp(at, "security.capability") && size >= 4)
            size = plain_capability(value, size);
        else if (!strncmp(at, "system.posix_acl_", 17))
            plain_acl(value, size);
        if (!tar_attribute(records, at, value, size)) {
            left_out(MANY_ATTRIBUTES);
            return;
        }
    }
}

static bool inside(Entry *e)
{
    if (e->uid < shift || e->gid < shift)
        return volume_wrong("it belongs to nobody inside:", path, EOVERFLOW);
    e->uid -= shift;
    e->gid -= shift;
    return true;
}

static bool put_open(Entry *e, int fd, const struct stat *st)
{
    Buf records = {0};
    if (moved(fd))
        return volume_wrong("it was moved by the overlay and not copied:", path, EXDEV);
    attributes(fd, &records);
    e->extra = buf_span(&records);
    bool fine = S_ISDIR(st->st_mode) ? tar_write(&tape, e) : tar_put(&tape, e, fd, (uint64_t)st->st_size, true);
    buf_free(&records);
    return fine || failed("writing");
}

static bool put_file(Entry *e, int dir, const char *name)
{
    struct stat now;
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT || failed("opening");
    bool file = !fstat(fd, &now) && S_ISREG(now.st_mode), fine = !file || put_open(e, fd, &now);
    if (file && fine)
        tree_remember(&now);
    close(fd);
    return fine;
}

/* What is no directory. The first of a file's names that is kept has its content, the others lead to that one. */
static bool put_other(int dir, const char *name, const struct stat *st)
{
    static Entry e;
    strcpy(walked, path);
    if (!tree_entry(&e, dir, name, st)) /* it has gone, or is no link any more */
        return errno == ENOENT || errno == EINVAL || failed("reading");
    if (!inside(&e))
        return false;
    if (!e.type)
        return left_out("it is a socket");
    if (e.type == '0')
        return put_file(&e, dir, name);
    if (!tar_write(&tape, &e))
        return failed("writing");
    tree_remember(st);
    return true;
}

static bool put_directory(int fd, const struct stat *st, bool hides)
{
    static Entry e;
    memset(&e, 0, sizeof e);
    e.type = '5';
    strcpy(e.path, *path ? path : ".");
    e.mode = st->st_mode & 07777;
    e.uid = st->st_uid;
    e.gid = st->st_gid;
    e.mtime_s = st->st_mtim.tv_sec;
    e.mtime_ns = st->st_mtim.tv_nsec;
    return inside(&e) && put_open(&e, fd, st) && (!hides || put_name(path, OPAQUE_MARK, st));
}

/* the walk, in both at once: low is -1 where nothing below is seen */

static bool same_owner(const struct stat *a, const struct stat *b)
{
    return a->st_mode == b->st_mode && a->st_uid - shift == b->st_uid && a->st_gid - shift == b->st_gid;
}

static bool same(const struct stat *a, const struct stat *b)
{
    return same_owner(a, b) && a->st_rdev == b->st_rdev &&
           (S_ISDIR(a->st_mode) || (a->st_size == b->st_size && a->st_mtim.tv_sec == b->st_mtim.tv_sec &&
                                    a->st_mtim.tv_nsec == b->st_mtim.tv_nsec));
}

static bool level(int up, int low, size_t at);

static bool extend(size_t *at, const char *name)
{
    size_t n = strlen(name);
    if (*at + n + 2 > sizeof path)
        return volume_wrong("too deep", path, ENAMETOOLONG);
    if (*at)
        path[(*at)++] = '/';
    memcpy(path + *at, name, n + 1);
    *at += n;
    return true;
}

/* What an opaque directory hides. */
static bool hidden(int up, int low, size_t at)
{
    struct stat st;
    char **names = listing ? tree_names(low) : NULL;
    bool fine = true;
    for (char **name = names; fine && name && *name; name++) {
        size_t here = at;
        if (!fstatat(up, *name, &st, AT_SYMLINK_NOFOLLOW))
            continue;
        fine = extend(&here, *name) && (is_own() || tell('D'));
        path[at] = 0;
    }
    tree_free(names);
    return fine;
}

static bool into(int dir, int low, const char *name, const struct stat *st, const struct stat *was, size_t at)
{
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT || errno == ENOTDIR || errno == ELOOP || failed("opening");
    bool hides = opaque(fd), was_directory = was && S_ISDIR(was->st_mode);
    int below = was_directory ? openat(low, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
    struct stat now;
    size_t before = told;
    bool fine = listing || (!fstat(fd, &now) && put_directory(fd, &now, hides && was_directory));
    if (!was)
        fine = fine && tell('A');
    fine = fine && level(fd, hides ? -1 : below, at) && (!hides || below < 0 || hidden(fd, below, at));
    if (was && (told > before || !same(st, was)))
        fine = fine && tell('C');
    close_fd(&below);
    close(fd);
    return fine;
}

static bool one(int up, int low, const char *name, size_t at)
{
    struct stat st, was;
    bool had = low >= 0 && !fstatat(low, name, &was, AT_SYMLINK_NOFOLLOW);
    if (fstatat(up, name, &st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT || failed("looking at");
    if (is_own() || (!had && for_mount(up, name)))
        return true;
    if (!listing && !strncmp(name, WHITEOUT, strlen(WHITEOUT)))
        return left_out("a layer has no such name"); /* it would remove what has the rest of the name */
    if (whiteout(&st))
        return !had || (tell('D') && (listing || put_whiteout(name, &st)));
    if (S_ISDIR(st.st_mode))
        return into(up, low, name, &st, had ? &was : NULL, at);
    if ((!had || !same(&st, &was)) && !tell(had ? 'C' : 'A'))
        return false;
    return listing || put_other(up, name, &st);
}

static bool level(int up, int low, size_t at)
{
    char **names = tree_names(up);
    bool fine = names != NULL || failed("reading");
    for (char **name = names; fine && *name; name++) {
        size_t here = at;
        fine = extend(&here, *name) && one(up, low, *name, here);
        path[at] = 0;
    }
    tree_free(names);
    return fine;
}

/* freezing */

static bool stands(const char *file)
{
    char events[TAR_PATH], text[512];
    bool v1 = strstr(file, "freezer.state");
    snprintf(events, sizeof events, "%s", file);
    if (!v1)
        strcpy(strrchr(events, '/'), "/cgroup.events");
    return read_small(events, text, sizeof text) > 0 && (v1 ? !strncmp(text, "FROZEN", 6) : !!strstr(text, "frozen 1"));
}

static bool thaw(const char *file) { return !file || write_file(file, strstr(file, "freezer.state") ? "THAWED" : "0"); }

static bool freeze(const char *file)
{
    if (!file)
        return true;
    bool v1 = strstr(file, "freezer.state"), fine = write_file(file, v1 ? "FROZEN" : "1");
    for (int64_t end = ticks_ms() + FREEZE_MS; fine && !stands(file); sleep_ms(2)) {
        if (ticks_ms() > end) {
            errno = ETIMEDOUT;
            fine = false;
        } else if (v1) {
            fine = write_file(file, "FROZEN"); /* what is started meanwhile: cgroup-v1/freezer-subsystem.rst */
        }
    }
    if (!fine) {
        volume_complain("freezing", file);
        thaw(file);
    }
    return fine;
}

/* starting */

static bool option(const char *word, const char *value, const char **frozen)
{
    bool fine = true;
    if (!strcmp(word, "--shift"))
        shift = (uint32_t)strtoul(value, NULL, 10);
    else if (!strcmp(word, "--freeze"))
        fine = strrchr(*frozen = value, '/') != NULL && strlen(value) < TAR_PATH;
    else if (!strcmp(word, "--own") && nown < PATHS_MAX)
        own[nown++] = value;
    else if (!strcmp(word, "--mount") && nmounts < PATHS_MAX)
        mounts[nmounts++] = value;
    else
        fine = false;
    return fine || copy_refuse(COPY_FAILED, word, "there is no such option") < 0;
}

static bool write_all_of(int up, int low)
{
    struct stat st;
    if (fstat(up, &st) || !tape_flow(&tape, 1))
        return failed("starting");
    if (!listing && !put_directory(up, &st, false))
        return false;
    return level(up, low, 0) && (listing ? tape_flush(&tape) : tar_finish(&tape));
}

int layer_main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "", *frozen = NULL;
    char **next = argv + 2;
    listing = !strcmp(how, "--changes");
    if (!listing && strcmp(how, "--layer") != 0)
        return -1;
    for (; next[0] && next[1] && !strncmp(*next, "--", 2); next += 2)
        if (!option(next[0], next[1], &frozen))
            return COPY_FAILED;
    if (!next[0] || !next[1] || next[2])
        return copy_refuse(COPY_FAILED, how, "it wants two directories");
    int up = open(next[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC), low = open(next[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (up < 0 || low < 0)
        return copy_fail(errno == ENOENT ? COPY_ABSENT : COPY_FAILED, next[up < 0 ? 0 : 1]);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    signal(SIGPIPE, SIG_IGN); /* or what is frozen would stay so */
    many_descriptors();
    if (!freeze(frozen))
        return COPY_FAILED;
    bool fine = write_all_of(up, low);
    return thaw(frozen) && fine ? 0 : COPY_FAILED;
}
