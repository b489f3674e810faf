#include "core.h"

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

uint64_t kmig_host_tsc(void)
{
    return __builtin_ia32_rdtsc();
}
