/* Into an environment: an archive, to where Docker's rules for `cp` put it.

   One of somebody's own (--archive) goes below a directory that is there. Else it is of one thing: its first entry, and
   what is in that, where it is a directory.

   what it is    what is at PATH                      where it goes
   anything      nothing, and PATH ends with a slash  refused, but for a directory
   a directory   nothing                              PATH, which is made
   a directory   a directory                          PATH/NAME; with --contents PATH
   a directory   anything else                        refused
   anything      nothing, or no directory             PATH, replaced
   anything      a directory                          PATH/NAME */
#include "copy.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static Tape tape;
static Entry entry;

static int damaged(void)
{
    dprintf(2, "the archive ends too early, or is damaged\n");
    return COPY_FAILED;
}

/* Everything below the tree's root; of one thing its name goes first, and is taken off. */
static int unpack_rest(Tree *tree, size_t taken)
{
    int found;
    while ((found = tar_read(&tape, &entry)) > 0) {
        char *target = entry.type == '1' ? entry.target : NULL;
        if (taken && (strlen(entry.path) <= taken || (target && strlen(target) <= taken)))
            return copy_refuse(COPY_FAILED, entry.path, "it is not in what is copied");
        if (taken)
            memmove(entry.path, entry.path + taken, strlen(entry.path + taken) + 1);
        if (taken && target)
            memmove(target, target + taken, strlen(target + taken) + 1);
        if (!unpack_one(&tape, tree, &entry))
            return COPY_FAILED;
    }
    if (found < 0)
        return damaged();
    return unpack_finish(tree) && tape_drain(&tape) ? 0 : COPY_FAILED;
}

static Tree tree_at(const Copy *c, int root)
{
    return (Tree){.root = root, .parent = -1, .inside = true, .owners = c->owners, .fds = c->fds};
}

static int archive_in(const Copy *c, const char *path)
{
    Tree tree = tree_at(c, copy_open(c, path, O_PATH | O_DIRECTORY));
    if (tree.root < 0)
        return copy_fail(errno == ENOENT ? COPY_ABSENT : COPY_REFUSED, path);
    return unpack_rest(&tree, 0);
}

/* The directory `name` in `dir`, made where there is none; then what is in it. */
static int directory_in(const Copy *c, int dir, const char *name, const char *path)
{
    size_t taken = strlen(entry.path);
    Tree parent = tree_at(c, dir);
    while (taken && entry.path[taken - 1] == '/')
        taken--;
    if (strcmp(name, ".") != 0) {
        strcpy(entry.path, name);
        if (!unpack_one(&tape, &parent, &entry))
            return COPY_FAILED;
    }
    Tree tree = tree_at(c, openat(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (tree.root < 0)
        return copy_fail(COPY_REFUSED, path);
    int code = unpack_rest(&tree, taken + 1);
    return code ? code : unpack_finish(&parent) ? 0 : COPY_FAILED;
}

static int other_in(const Copy *c, int dir, const char *name)
{
    Tree tree = tree_at(c, dir);
    strcpy(entry.path, name);
    if (!unpack_one(&tape, &tree, &entry))
        return COPY_FAILED;
    return unpack_rest(&tree, SIZE_MAX);
}

static int put_at(const Copy *c, int dir, const char *name, const char *path)
{
    if (dir < 0)
        return copy_fail(errno == ENOENT ? COPY_ABSENT : COPY_REFUSED, path);
    int code = entry.type == '5' ? directory_in(c, dir, name, path) : other_in(c, dir, name);
    close(dir);
    return code;
}

static int into_directory(const Copy *c, int at, const char *name, const char *path)
{
    if (entry.type == '5' && c->contents)
        return put_at(c, at, ".", path);
    if (!volume_section(name, strlen(name))) {
        close(at);
        return copy_refuse(COPY_FAILED, name, "this is no name");
    }
    return put_at(c, at, name, path);
}

static int item_in(const Copy *c, const char *path, const char *name)
{
    char last[256];
    struct stat st;
    bool directory = entry.type == '5', slash = copy_wants_directory(path) || !*path;
    int at = copy_open(c, path, O_PATH);
    if (at >= 0 && !fstat(at, &st) && S_ISDIR(st.st_mode))
        return into_directory(c, at, name, path);
    int error = errno;
    if (at >= 0) {
        close(at);
        if (directory || slash)
            return copy_refuse(COPY_REFUSED, path, directory ? "a directory can't be copied to a file" : strerror(ENOTDIR));
        return put_at(c, copy_target(c, path, last), last, path);
    }
    errno = error;
    if (error != ENOENT)
        return copy_fail(COPY_REFUSED, path);
    if (slash && !directory)
        return copy_refuse(COPY_ABSENT, path, "there is no such directory");
    return put_at(c, copy_target(c, path, last), last, path);
}

int copy_in(const Copy *c, const char *path, const char *name)
{
    if (!tape_flow(&tape, 0))
        return copy_fail(COPY_FAILED, path);
    if (c->archive)
        return archive_in(c, path);
    if (tar_read(&tape, &entry) <= 0)
        return damaged();
    return item_in(c, path, name);
}
