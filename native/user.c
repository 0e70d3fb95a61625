#include "user.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DATABASE_BYTES = 1 << 20 };

/* The lines of a colon-separated file, one after the other; fields[] point into the file's text. */
typedef struct {
    char *text, *at;
} Lines;

static Lines lines_open(const char *path)
{
    Lines l = {malloc(DATABASE_BYTES), NULL};
    if (l.text && read_small(path, l.text, DATABASE_BYTES) >= 0)
        l.at = l.text;
    return l;
}

static size_t lines_next(Lines *l, char **fields, size_t max)
{
    char *line;
    while (l->at && (line = strsep(&l->at, "\n"))) {
        size_t n = 0;
        char *field;
        while (n < max && (field = strsep(&line, ":")))
            fields[n++] = field;
        if (n >= 3)
            return n;
    }
    return 0;
}

static bool number(const char *text, unsigned *value)
{
    char *end;
    if (!*text || strspn(text, "0123456789") != strlen(text) || strlen(text) > 10)
        return false;
    unsigned long v = strtoul(text, &end, 10);
    *value = (unsigned)v;
    return v < UINT32_MAX; /* the last one means "no change" to the kernel */
}

static bool passwd_find(const char *name, bool by_uid, uid_t uid, User *u, char *found, size_t size)
{
    char *f[7];
    unsigned id, gid;
    size_t n;
    bool hit = false;
    Lines l = lines_open("/etc/passwd");
    while (!hit && (n = lines_next(&l, f, LEN(f)))) {
        if (n < 6 || !number(f[2], &id) || !number(f[3], &gid) || (by_uid ? id != uid : strcmp(f[0], name) != 0))
            continue;
        hit = true;
        u->uid = id;
        u->gid = gid;
        snprintf(u->home, sizeof u->home, "%s", f[5]);
        snprintf(found, size, "%s", f[0]);
    }
    free(l.text);
    return hit;
}

static bool group_find(const char *name, gid_t *gid)
{
    char *f[4];
    unsigned id;
    bool hit = number(name, gid);
    Lines l = lines_open("/etc/group");
    while (!hit && lines_next(&l, f, LEN(f)))
        if (!strcmp(f[0], name) && number(f[2], &id)) {
            *gid = id;
            hit = true;
        }
    free(l.text);
    return hit;
}

static bool listed(char *members, const char *name)
{
    char *member;
    while ((member = strsep(&members, ",")))
        if (!strcmp(member, name))
            return true;
    return false;
}

static void supplementary(const char *name, User *u)
{
    char *f[4];
    unsigned id;
    size_t n;
    Lines l = lines_open("/etc/group");
    while ((n = lines_next(&l, f, LEN(f))) && u->ngroups < LEN(u->groups))
        if (n == 4 && number(f[2], &id) && listed(f[3], name))
            u->groups[u->ngroups++] = id;
    free(l.text);
}

const char *user_find(const char *text, User *u)
{
    char copy[256], name[64] = "";
    memset(u, 0, sizeof *u);
    if (!*text) {
        passwd_find(NULL, true, geteuid(), u, name, sizeof name);
        return NULL;
    }
    snprintf(copy, sizeof copy, "%s", text);
    char *group = strchr(copy, ':');
    if (group)
        *group++ = 0;
    u->change = true;
    if (number(copy, &u->uid))
        passwd_find(NULL, true, u->uid, u, name, sizeof name); /* absent: group 0, as Docker does */
    else if (!passwd_find(copy, false, 0, u, name, sizeof name) && strcmp(copy, "root") != 0)
        return "not found in /etc/passwd"; /* an image without a passwd has a root all the same */
    if (!group || !*group) {
        u->groups[u->ngroups++] = u->gid;
        if (*name)
            supplementary(name, u);
        return NULL;
    }
    /* An explicit group is the only one, as in Docker. */
    return group_find(group, &u->gid) ? NULL : "group not found in /etc/group";
}
