#include "core.h"

#include <string.h>
#include <sys/ioctl.h>

int kmig_ioctl(int fd, unsigned long request, void *arg)
{
    int rc;

    do
        rc = ioctl(fd, request, arg);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : rc;
}

int kmig_ioctl_value(int fd, unsigned long request, unsigned long arg)
{
    return kmig_ioctl(fd, request, (void *)arg);
}

void kmig_steps_run(struct kmig_step *step, uint32_t nr_steps)
{
    for (uint32_t i = 0; i < nr_steps; i++, step++) {
        step->result = kmig_ioctl(step->fd, step->request, step->arg);
        step->differs = step->held && memcmp(step->held, step->expected, step->expected_bytes) != 0;
    }
}

uint64_t kmig_host_tsc(void)
{
    return __builtin_ia32_rdtsc();
}
