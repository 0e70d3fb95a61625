/* What is done after a process has ended and before anybody is told so: the agent packs a machine's volumes then,
   because whoever hears of MAIN's end ends the machine. */
#include "node.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { AFTER_S = 120 };

static char **copy(char **list)
{
    size_t n = 0;
    while (list[n])
        n++;
    char **out = xalloc((n + 1) * sizeof *out);
    for (size_t i = 0; i < n; i++)
        out[i] = strdup(list[i]);
    return out;
}

void after_set(Proc *p, const Frame *f)
{
    char **argv = field_list(f->body, T_INVERSE);
    if (node.after && *argv && !p->after)
        p->after = copy(argv);
}

void after_free(Proc *p)
{
    for (char **word = p->after; word && *word; word++)
        free(*word);
    free(p->after);
    p->after = NULL;
}

/* Its time is bounded by an alarm, which outlives the exec (execve(2)). */
static void child(char **argv)
{
    static char *env[] = {"PATH=/bin", NULL};
    Failure f;
    setsid();
    child_reset();
    alarm(AFTER_S);
    exec_command(argv, env, &f);
    dprintf(2, "isolat-agent: %s\n", f.message);
    _exit(f.code);
}

/* True: its end is told later. */
bool after_begins(Proc *p, int code, int signal)
{
    if (p->after_pid)
        return true;
    if (!p->after)
        return false;
    p->after_pid = fork();
    if (p->after_pid == 0)
        child(p->after);
    after_free(p);
    if (p->after_pid < 0) {
        p->after_pid = 0;
        return false;
    }
    p->early = true; /* it has ended: its pid is nobody's any more */
    p->code = code;
    p->signal = signal;
    return true;
}

bool after_ended(pid_t pid)
{
    for (Proc *p = node.procs; p; p = p->next)
        if (p->name && p->after_pid == pid) {
            p->after_pid = 0;
            proc_exited(p, p->code, p->signal);
            return true;
        }
    return false;
}
