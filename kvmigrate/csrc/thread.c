#include "core.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

// struct sched_attr of <linux/sched/types.h> in its first version: that header and <sched.h> do not go together.
struct attributes {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime;
    uint64_t deadline;
    uint64_t period;
};

int kmig_thread_slice(uint64_t slice_ns)
{
    struct attributes own = {.size = sizeof(own)};

    if (syscall(SYS_sched_getattr, 0, &own, sizeof(own), 0) < 0)
        return -errno;
    if (own.policy != SCHED_OTHER)
        return 0;
    own.runtime = slice_ns;
    return syscall(SYS_sched_setattr, 0, &own, 0) < 0 ? -errno : 0;
}
