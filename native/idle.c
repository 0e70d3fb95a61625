#include "machine.h"
int64_t idle_ms(void) { return 0; }
