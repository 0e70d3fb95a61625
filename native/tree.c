/* A walk through directories by their descriptors: in the order of names, never through a symbolic link. */
#include "tar.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { SECTION_MAX = 255, NODE_BUCKETS = 4096, NAMES_FIRST = 64 };

char walked[TAR_PATH];

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

bool volume_section(const char *p, size_t n)
{
    return n && n <= SECTION_MAX && !(p[0] == '.' && (n == 1 || (n == 2 && p[1] == '.')));
}

void many_descriptors(void)
{
    struct rlimit most;
    if (!getrlimit(RLIMIT_NOFILE, &most)) {
        most.rlim_cur = most.rlim_max;
        setrlimit(RLIMIT_NOFILE, &most);
    }
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

void tree_free(char **names)
{
    for (char **at = names; at && *at; at++)
        free(*at);
    free(names);
}

static bool collect(DIR *d, char ***names, size_t *n)
{
    size_t room = NAMES_FIRST;
    if (!(*names = malloc(room * sizeof **names)))
        return false;
    for (struct dirent *e; (errno = 0, e = readdir(d));) {
        if (!volume_section(e->d_name, strlen(e->d_name)))
            continue;
        if (*n + 1 == room) {
            char **more = realloc(*names, (room *= 2) * sizeof *more);
            if (!more)
                return false;
            *names = more;
        }
        if (!((*names)[*n] = strdup(e->d_name)))
            return false;
        ++*n;
    }
    return !errno;
}

char **tree_names(int dir)
{
    char **names = NULL;
    size_t n = 0;
    int own = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* with a position of its own */
    DIR *d = own < 0 ? NULL : fdopendir(own);
    bool fine = d && collect(d, &names, &n);
    int error = errno;
    if (d)
        closedir(d);
    if (names)
        names[n] = NULL;
    if (!fine) {
        tree_free(names);
        errno = error;
        return NULL;
    }
    qsort(names, n, sizeof *names, by_name);
    return names;
}

static bool walk(int dir, const char *name, size_t at, Visit visit);

static bool walk_into(int fd, size_t at, Visit visit)
{
    char **names = tree_names(fd);
    bool fine = names != NULL || volume_complain("reading", walked);
    for (char **next = names; fine && *next; next++) {
        size_t n = strlen(*next);
        if (at + n + 2 > TAR_PATH) {
            fine = volume_wrong("too deep", walked, ENAMETOOLONG);
            break;
        }
        walked[at] = '/';
        memcpy(walked + at + 1, *next, n + 1);
        fine = walk(fd, *next, at + 1 + n, visit);
        walked[at] = 0;
    }
    tree_free(names);
    return fine;
}

static bool walk(int dir, const char *name, size_t at, Visit visit)
{
    struct stat st;
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT || volume_complain("looking at", walked);
    Walk next = visit(dir, name, &st);
    if (next != WALK_INTO || !S_ISDIR(st.st_mode))
        return next != WALK_STOP;
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) /* it has gone, or is something else now */
        return errno == ENOENT || errno == ENOTDIR || errno == ELOOP || volume_complain("opening", walked);
    bool fine = walk_into(fd, at, visit);
    close(fd);
    return fine;
}

bool tree_walk(int dir, const char *name, const char *as, Visit visit)
{
    size_t n = strlen(as);
    if (n >= sizeof walked)
        return volume_wrong("too long", as, ENAMETOOLONG);
    memcpy(walked, as, n + 1);
    return walk(dir, name, n, visit);
}

typedef struct Name {
    struct Name *next;
    ino_t inode;
    dev_t device;
    char path[];
} Name;

static Name **bucket_of(const struct stat *st)
{
    static Name *names[NODE_BUCKETS];
    return &names[st->st_ino % NODE_BUCKETS];
}

static const char *known_as(const struct stat *st)
{
    if (S_ISDIR(st->st_mode) || st->st_nlink < 2)
        return NULL;
    for (Name *n = *bucket_of(st); n; n = n->next)
        if (n->inode == st->st_ino && n->device == st->st_dev)
            return n->path;
    return NULL;
}

void tree_remember(const struct stat *st)
{
    if (S_ISDIR(st->st_mode) || st->st_nlink < 2 || known_as(st))
        return;
    Name **bucket = bucket_of(st), *n = xalloc(sizeof *n + strlen(walked) + 1);
    n->inode = st->st_ino;
    n->device = st->st_dev;
    strcpy(n->path, walked);
    n->next = *bucket;
    *bucket = n;
}

static char type_of(mode_t mode)
{
    switch (mode & S_IFMT) {
    case S_IFREG: return '0';
    case S_IFLNK: return '2';
    case S_IFCHR: return '3';
    case S_IFBLK: return '4';
    case S_IFDIR: return '5';
    case S_IFIFO: return '6';
    default: return 0; /* a socket */
    }
}

bool tree_entry(Entry *e, int dir, const char *name, const struct stat *st)
{
    const char *other = known_as(st);
    memset(e, 0, sizeof *e);
    e->type = other ? '1' : type_of(st->st_mode);
    strcpy(e->path, walked);
    if (other)
        strcpy(e->target, other);
    else if (e->type == '2' && readlinkat(dir, name, e->target, sizeof e->target - 1) < 0)
        return false;
    e->mode = st->st_mode & 07777;
    e->uid = st->st_uid;
    e->gid = st->st_gid;
    e->mtime_s = st->st_mtim.tv_sec;
    e->mtime_ns = st->st_mtim.tv_nsec;
    e->major = major(st->st_rdev);
    e->minor = minor(st->st_rdev);
    return true;
}
