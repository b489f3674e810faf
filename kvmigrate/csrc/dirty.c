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

// The words of a window in a slot's bitmaps.
struct words {
    size_t word;
    size_t end;
};

static struct words words_of(const struct kmig_slot *slot, uint64_t window)
{
    uint64_t first = window * KMIG_WINDOW_PAGES;
    return (struct words){first / 64, kmig_bits_words(kmig_window_end(slot, first))};
}

// Whether the VMM may have written in the window since it was asked last.
static bool take_host_window(struct kmig_slot *slot, uint64_t window)
{
    uint64_t bit = UINT64_C(1) << (window % 64), *word = &slot->host_windows[window / 64];

    if (!(__atomic_load_n(word, __ATOMIC_RELAXED) & bit))
        return false;
    __atomic_fetch_and(word, ~bit, __ATOMIC_ACQUIRE);
    return true;
}

static uint64_t take_host_writes(struct kmig_slot *slot, size_t word)
{
    if (!__atomic_load_n(&slot->host_dirty[word], __ATOMIC_RELAXED))
        return 0;
    return __atomic_exchange_n(&slot->host_dirty[word], 0, __ATOMIC_ACQUIRE);
}

static bool is_clean(const uint64_t *log, struct words at)
{
    uint64_t any = 0;
    for (; at.word < at.end; at.word++)
        any |= log[at.word];
    return any == 0;
}

static uint64_t count_pending(const struct kmig_slot *slot, uint64_t window)
{
    uint64_t first = window * KMIG_WINDOW_PAGES;
    return kmig_bits_count(slot->pending, first, kmig_window_end(slot, first));
}

// Add what was logged in a window, and what the VMM wrote there, to what is pending. Returns how many pages that is. Of
// a window that nobody wrote in only KVM's log is read; of an empty one not even that.
static uint64_t merge_window(struct kmig_slot *slot, uint64_t window)
{
    if (kmig_bits_test(slot->empty_windows, window))
        return kmig_bits_test(slot->pending_windows, window) ? count_pending(slot, window) : 0;
    struct words at = words_of(slot, window);
    bool host = take_host_window(slot, window) && !KMIG_FAULT("forget-host-bitmap");
    uint64_t nr_pending = 0;

    if (!host && !kmig_bits_test(slot->pending_windows, window) && is_clean(slot->log, at))
        return 0;
    for (; at.word < at.end; at.word++) {
        slot->pending[at.word] |= slot->log[at.word] | (host ? take_host_writes(slot, at.word) : 0);
        nr_pending += (uint64_t)__builtin_popcountll(slot->pending[at.word]);
    }
    if (nr_pending)
        kmig_bits_set(slot->pending_windows, window);
    return nr_pending;
}

uint64_t kmig_slot_count_pending(const struct kmig_slot *slot)
{
    uint64_t nr_windows = kmig_windows_of(slot->nr_pages), nr_pending = 0;

    for (uint64_t window = 0; (window = kmig_bits_next(slot->pending_windows, window, nr_windows)) < nr_windows; window++)
        nr_pending += count_pending(slot, window);
    return nr_pending;
}

static void forget_pending(struct kmig_slot *slot)
{
    for (uint64_t window = 0; window < kmig_windows_of(slot->nr_pages); window++) {
        struct words at = words_of(slot, window);
        if (kmig_bits_test(slot->pending_windows, window))
            memset(slot->pending + at.word, 0, (at.end - at.word) * 8);
    }
    memset(slot->pending_windows, 0, kmig_bits_words(kmig_windows_of(slot->nr_pages)) * 8);
    memset(slot->empty_windows, 0, kmig_bits_words(kmig_windows_of(slot->nr_pages)) * 8);
}

// Forget what the VMM wrote, and take every page as pending: which ones need no look is found by the first round.
static void reset_pending(struct kmig_memory *memory)
{
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        struct kmig_slot *slot = &memory->slot[i];
        for (uint64_t window = 0; window < kmig_windows_of(slot->nr_pages); window++)
            if (take_host_window(slot, window))
                for (struct words at = words_of(slot, window); at.word < at.end; at.word++)
                    take_host_writes(slot, at.word);
        kmig_slot_all_pending(slot);
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
        forget_pending(slot);
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

long kmig_dirty_sync(struct kmig_memory *memory)
{
    uint64_t nr_pending = 0;

    if (memory->log_mode == KMIG_LOG_OFF)
        return -EINVAL;
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        struct kmig_slot *slot = &memory->slot[i];
        int rc = fetch_log(memory, slot);
        if (rc == 0)
            rc = kmig_slot_find_touched(memory, slot);
        if (rc < 0)
            return rc;
        for (uint64_t window = 0; window < kmig_windows_of(slot->nr_pages); window++)
            nr_pending += merge_window(slot, window);
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
