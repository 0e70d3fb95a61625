#include "machine.h"
int boot_as_pid1(void) { die("boot"); }
int boot_service_port(void) { die("port"); }
