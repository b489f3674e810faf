// Exits that are answered without leaving C: the registers that a busy guest uses all the time. The rest of each device,
// which needs Python anyway, stays with the caller of kmig_vcpu_run.
#include <string.h>

#include "uart.h"
#include "vcpu.h"

// virtio-mmio (virtio 1.2, 4.2.2): a driver reads and acknowledges every interrupt, by aligned accesses of 32 bits.
#define INTERRUPT_STATUS 0x60
#define INTERRUPT_ACK 0x64

static bool answer_virtio(const struct kmig_answers *answers, struct kvm_run *run)
{
    uint32_t bits;

    if (run->mmio.len != sizeof(bits))
        return false;
    uint64_t wanted = run->mmio.phys_addr - (run->mmio.is_write ? INTERRUPT_ACK : INTERRUPT_STATUS);
    for (uint32_t i = 0; i < answers->nr_virtio; i++) {
        if (answers->virtio[i].gpa != wanted)
            continue;
        struct kmig_virtio *device = answers->virtio[i].device;
        if (run->mmio.is_write) {
            memcpy(&bits, run->mmio.data, sizeof(bits));
            kmig_virtio_ack(device, bits);
        } else {
            bits = __atomic_load_n(&device->isr, __ATOMIC_SEQ_CST);
            memcpy(run->mmio.data, &bits, sizeof(bits));
        }
        return true;
    }
    return false;
}

static bool answer_uart(const struct kmig_answers *answers, struct kmig_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint32_t offset = (uint32_t)run->io.port - answers->uart_port;
    uint64_t at = run->io.data_offset;

    if (!answers->uart || offset >= KMIG_UART_NR_PORTS || run->io.size != 1)
        return false;
    if (at > vcpu->run_bytes || run->io.count > vcpu->run_bytes - at)
        return false;
    bool is_write = run->io.direction == KVM_EXIT_IO_OUT;
    return kmig_uart_answer(answers->uart, offset, is_write, (uint8_t *)run + at, run->io.count);
}

bool kmig_vcpu_answer(struct kmig_vcpu *vcpu)
{
    const struct kmig_answers *answers = &vcpu->group->answers;

    switch (vcpu->run->exit_reason) {
    case KVM_EXIT_MMIO:
        return answer_virtio(answers, vcpu->run);
    case KVM_EXIT_IO:
        return answer_uart(answers, vcpu);
    default:
        return false;
    }
}

// Under the lock. A vCPU's thread reads the answers without it.
static bool may_change(const struct kmig_vcpus *vcpus)
{
    const struct kmig_vcpu *vcpu;

    for (vcpu = vcpus->first; vcpu; vcpu = vcpu->next)
        if (vcpu->tid)
            return false;
    return true;
}

int kmig_vcpus_answer_virtio(struct kmig_vcpus *vcpus, uint64_t gpa, struct kmig_virtio *device)
{
    struct kmig_answers *answers = &vcpus->answers;
    int rc = 0;

    pthread_mutex_lock(&vcpus->lock);
    for (uint32_t i = 0; i < answers->nr_virtio; i++)
        if (answers->virtio[i].gpa == gpa)
            rc = -EEXIST;
    if (!may_change(vcpus))
        rc = -EBUSY;
    else if (answers->nr_virtio == KMIG_MAX_ANSWERED_VIRTIO)
        rc = -ENOSPC;
    if (rc == 0) {
        answers->virtio[answers->nr_virtio].gpa = gpa;
        answers->virtio[answers->nr_virtio].device = device;
        answers->nr_virtio++;
    }
    pthread_mutex_unlock(&vcpus->lock);
    return rc;
}

int kmig_vcpus_answer_uart(struct kmig_vcpus *vcpus, uint16_t port, struct kmig_uart *uart)
{
    int rc;

    pthread_mutex_lock(&vcpus->lock);
    rc = !may_change(vcpus) ? -EBUSY : vcpus->answers.uart ? -EEXIST : 0;
    if (rc == 0) {
        vcpus->answers.uart = uart;
        vcpus->answers.uart_port = port;
    }
    pthread_mutex_unlock(&vcpus->lock);
    return rc;
}
