// Planted faults: compiled only into the build that proves that the tests notice each of them.
#include "core.h"

#ifdef KMIG_PLANTED_FAULTS
#include <stdlib.h>
#include <string.h>

bool kmig_fault_is(const char *name)
{
    const char *planted = getenv("KVMIGRATE_PLANT");
    return planted && strcmp(planted, name) == 0;
}
#endif
