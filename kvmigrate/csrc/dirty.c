// The dirty log of KVM and the VMM's own, as one set of pending pages.
#include <string.h>
#include <sys/mman.h>

#include "bits.h"
#include "internal.h"

// Choose whether fetching the log also clears it. With KVM_DIRTY_LOG_INITIALLY_SET, where the kernel has it, nothing is
// write-protected when logging starts: every bit is set until it is cleared for the first time (KVM api.rst 7.18).
static int choose_protocol(const struct kmig_memory *memory, int mode)
{
    struct kvm_enable_cap enable = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2};
    int flags = kmig_ioctl_value(memory->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);

    if (flags <= 0)
        return mode == KMIG_LOG_GET ? 0 : -EOPNOTSUPP;
    if (mode == KMIG_LOG_CLEAR)
        enable.args[0] = (uint64_t)flags & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    return kmig_ioctl(memory->vm_fd, KVM_ENABLE_CAP, &enable);
}

static int log_all_slots(const struct kmig_memory *memory)
{
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        int rc = kmig_memory_log_slot(memory, i, true);
        if (rc < 0) {
            while (i-- > 0)
                kmig_memory_log_slot(memory, i, false);
            return rc;
        }
    }
    return 0;
}

// Forget what the VMM wrote, and take every page as pending: which ones need no look is found by the first round.
static void reset_pending(struct kmig_memory *memory)
{
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        struct kmig_slot *slot = &memory->slot[i];
        for (size_t word = 0; word < kmig_bits_words(slot->nr_pages); word++)
            __atomic_store_n(&slot->host_dirty[word], 0, __ATOMIC_RELAXED);
        kmig_bits_set_range(slot->pending, 0, slot->nr_pages);
    }
}

int kmig_dirty_start(struct kmig_memory *memory, int mode)
{
    if (mode != KMIG_LOG_GET && mode != KMIG_LOG_CLEAR)
        return -EINVAL;
    if (memory->log_mode != KMIG_LOG_OFF)
        return -EBUSY;
    if (memory->vm_fd >= 0) {
        int rc = choose_protocol(memory, mode);
        if (rc >= 0)
            rc = log_all_slots(memory);
        if (rc < 0)
            return rc;
    }
    reset_pending(memory);
    memory->log_mode = mode;
    return 0;
}

int kmig_dirty_stop(struct kmig_memory *memory)
{
    int rc = 0;

    if (memory->log_mode == KMIG_LOG_OFF)
        return 0;
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        struct kmig_slot *slot = &memory->slot[i];
        int slot_rc = memory->vm_fd >= 0 ? kmig_memory_log_slot(memory, i, false) : 0;
        rc = slot_rc < 0 ? slot_rc : rc;
        memset(slot->pending, 0, kmig_bits_words(slot->nr_pages) * 8);
    }
    memory->log_mode = KMIG_LOG_OFF;
    return rc;
}

static int fetch_log(const struct kmig_memory *memory, const struct kmig_slot *slot)
{
    struct kvm_dirty_log log = {.slot = slot->id, .dirty_bitmap = slot->log};

    if (memory->vm_fd < 0)
        return 0;
    return kmig_ioctl(memory->vm_fd, KVM_GET_DIRTY_LOG, &log);
}

static uint64_t take_host_writes(struct kmig_slot *slot, size_t word)
{
    if (KMIG_FAULT("forget-host-bitmap") || !__atomic_load_n(&slot->host_dirty[word], __ATOMIC_RELAXED))
        return 0;
    return __atomic_exchange_n(&slot->host_dirty[word], 0, __ATOMIC_ACQUIRE);
}

long kmig_dirty_sync(struct kmig_memory *memory)
{
    uint64_t nr_pending = 0;

    if (memory->log_mode == KMIG_LOG_OFF)
        return -EINVAL;
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        struct kmig_slot *slot = &memory->slot[i];
        int rc = fetch_log(memory, slot);
        if (rc < 0)
            return rc;
        for (size_t word = 0; word < kmig_bits_words(slot->nr_pages); word++)
            slot->pending[word] |= slot->log[word] | take_host_writes(slot, word);
        nr_pending += kmig_bits_count(slot->pending, 0, slot->nr_pages);
    }
    return (long)nr_pending;
}

int kmig_dirty_clear(struct kmig_memory *memory, uint32_t slot_index, uint64_t first, uint64_t nr_pages,
                     uint64_t *bitmap)
{
    if (memory->log_mode != KMIG_LOG_CLEAR || memory->vm_fd < 0)
        return 0;
    if (slot_index >= memory->nr_slots)
        return -EINVAL;
    struct kvm_clear_dirty_log clear = {
        .slot = memory->slot[slot_index].id,
        .num_pages = (uint32_t)nr_pages,
        .first_page = first,
        .dirty_bitmap = bitmap,
    };
    if (KMIG_FAULT("off-by-64-clear") && first >= 64) {
        uint64_t all = ~UINT64_C(0);
        struct kvm_clear_dirty_log before = {clear.slot, 64, first - 64, {&all}};
        kmig_ioctl(memory->vm_fd, KVM_CLEAR_DIRTY_LOG, &before);
    }
    int rc = kmig_ioctl(memory->vm_fd, KVM_CLEAR_DIRTY_LOG, &clear);
    return rc < 0 ? rc : 0;
}
