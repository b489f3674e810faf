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

int kmig_steps_run(int fd, char *memory, const struct kmig_step *step, uint32_t nr_steps, struct kmig_outcome *outcomes)
{
    int exact = 1;

    for (uint32_t i = 0; i < nr_steps; i++, step++) {
        struct kmig_outcome *outcome = outcomes + step->item;
        int rc = kmig_ioctl(fd, step->request, memory + step->arg);

        if (rc < 0 && outcome->rc == 0)
            outcome->rc = rc;
        if (rc != step->wanted || memcmp(memory + step->held, memory + step->expected, step->expected_bytes) != 0) {
            outcome->differs = 1;
            exact = 0;
        }
    }
    return exact;
}

// KVM's variable list, of one.
struct one_msr {
    struct kvm_msrs list;
    struct kvm_msr_entry entry;
};

int kmig_msr_get(int fd, uint32_t index, uint64_t *value)
{
    struct one_msr msr = {.list = {.nmsrs = 1}, .entry = {.index = index}};
    int rc = kmig_ioctl(fd, KVM_GET_MSRS, &msr);

    *value = msr.entry.data;
    return rc;
}

int kmig_msr_set(int fd, uint32_t index, uint64_t value)
{
    struct one_msr msr = {.list = {.nmsrs = 1}, .entry = {.index = index, .data = value}};

    return kmig_ioctl(fd, KVM_SET_MSRS, &msr);
}

int kmig_tsc_offset(int fd, unsigned long request, uint64_t *offset)
{
    struct kvm_device_attr attr = {
        .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)offset};

    return kmig_ioctl(fd, request, &attr);
}

uint64_t kmig_host_tsc(void)
{
    return __builtin_ia32_rdtsc();
}
