#include "machine.h"
#include <errno.h>
static void idle(Peer *who, const Frame *f)
{
    Buf body = {0};
    put_int(&body, T_COUNT, idle_ms());
    peer_reply(who, K_OK, f->id, &body);
}
bool machine_request(Peer *who, Frame *f)
{
    if (f->kind != K_IDLE)
        return false;
    idle(who, f);
    return true;
}
int print_tsc_khz(void) { return 1; }
