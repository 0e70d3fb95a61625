/* isolat-agent --nothing: end. It is what is started where nothing but the start matters (exercise.c).
   isolat-agent --ahead BYTES NAME...: read files once, so that whoever comes later finds them in memory.

   A name without a slash is looked for where a program would be. What is not there, or is no file, is left out, and
   nothing more is read after so many bytes. Looking is worth it, too: that there is no /usr/local/bin/sh is kept. */
#include "machine.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *const directories[] = {"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin",
                                          "/bin"};

/* O_NONBLOCK: a FIFO in the place of a file must not hold us. */
static bool read_file(const char *path, size_t *left)
{
    static char chunk[64 << 10];
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    bool there = fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode);
    while (there && *left) {
        ssize_t n = read(fd, chunk, *left < sizeof chunk ? *left : sizeof chunk);
        if (n <= 0)
            break;
        *left -= (size_t)n;
    }
    close_fd(&fd);
    return there;
}

static void read_program(const char *name, size_t *left)
{
    char path[4096];
    for (size_t i = 0; i < LEN(directories); i++)
        if (snprintf(path, sizeof path, "%s/%s", directories[i], name) < (int)sizeof path && read_file(path, left))
            return;
}

static int read_ahead(const char *bytes, char **names)
{
    size_t left = strtoull(bytes, NULL, 10);
    for (; *names; names++)
        if (strchr(*names, '/'))
            read_file(*names, &left);
        else
            read_program(*names, &left);
    return 0;
}

int ahead_main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    if (!strcmp(how, "--nothing"))
        return 0;
    return !strcmp(how, "--ahead") && argc > 3 ? read_ahead(argv[2], argv + 3) : -1;
}
