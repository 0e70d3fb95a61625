/* USER of a command, looked up in the /etc of the root in which we are. For a child: it may block and use memory. */
#ifndef ISOLAT_USER_H
#define ISOLAT_USER_H

#include "base.h"

typedef struct {
    bool change; /* false: stay who we are */
    uid_t uid;
    gid_t gid;
    gid_t groups[256];
    size_t ngroups;
    char home[256];
} User;

/* "" stays; else NAME or UID, then :GROUP or :GID. Returns what was not found, or NULL. */
const char *user_find(const char *text, User *u);

#endif
