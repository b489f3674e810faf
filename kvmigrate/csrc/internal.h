// What the files of the C core share and Python does not see.
#ifndef KMIG_INTERNAL_H
#define KMIG_INTERNAL_H

#include "bits.h"
#include "core.h"

// The slot that holds gfn, or NULL.
struct kmig_slot *kmig_memory_slot(const struct kmig_memory *memory, uint64_t gfn);

// Where gfn, which is RAM, lies here.
static inline uint8_t *kmig_memory_hva(const struct kmig_memory *memory, uint64_t gfn)
{
    const struct kmig_slot *slot = kmig_memory_slot(memory, gfn);
    return slot->hva + (gfn - slot->base_gfn) * KMIG_PAGE_BYTES;
}

// Give slot its hva, and its fd if it has one, made of backend. After an error both may be there all the same.
int kmig_backend_map(int backend, struct kmig_slot *slot);

// Keep memory of a guest out of core dumps and child processes.
void kmig_backend_keep_private(void *at, uint64_t size_bytes);

// Make the pages first..end of slot zero, and give them back where memory can be had again later. Marks nothing as written.
int kmig_backend_empty(struct kmig_memory *memory, struct kmig_slot *slot, uint64_t first, uint64_t end);

// Set bit n of bitmap for each page first + n of slot, up to end, that may hold anything but zeros, but for what is backed.
int kmig_slot_resident(struct kmig_memory *memory, const struct kmig_slot *slot, uint64_t first, uint64_t end,
                       uint64_t *bitmap);

// How many windows so many pages take.
static inline uint64_t kmig_windows_of(uint64_t nr_pages)
{
    return (nr_pages + KMIG_WINDOW_PAGES - 1) / KMIG_WINDOW_PAGES;
}

// Where the window ends in which page lies.
static inline uint64_t kmig_window_end(const struct kmig_slot *slot, uint64_t page)
{
    uint64_t end = (page / KMIG_WINDOW_PAGES + 1) * KMIG_WINDOW_PAGES;
    return end < slot->nr_pages ? end : slot->nr_pages;
}

// Make the pages first..end of slot pending.
static inline void kmig_slot_pending(struct kmig_slot *slot, uint64_t first, uint64_t end)
{
    kmig_bits_set_range(slot->pending, first, end);
    kmig_bits_set_range(slot->pending_windows, first / KMIG_WINDOW_PAGES, kmig_windows_of(end));
}

static inline void kmig_slot_all_pending(struct kmig_slot *slot)
{
    kmig_slot_pending(slot, 0, slot->nr_pages);
}

uint64_t kmig_slot_count_pending(const struct kmig_slot *slot);

// Make pending what is resident by now in the windows that were empty. Needs PAGEMAP_SCAN.
int kmig_slot_find_touched(const struct kmig_memory *memory, struct kmig_slot *slot);

// The VMM wrote the pages first..end of slot. To be called after the bytes are there: a sync that takes the marks before
// would have the old page copied and no mark left for the new one. The window's mark comes after the pages' own: a sync
// that sees it sees them.
static inline void kmig_host_wrote(struct kmig_slot *slot, uint64_t first, uint64_t end)
{
    kmig_bits_set_range_atomic(slot->host_dirty, first, end);
    kmig_bits_set_range_atomic(slot->host_windows, first / KMIG_WINDOW_PAGES, (end - 1) / KMIG_WINDOW_PAGES + 1);
}

// The same for the pages whose bits stand in one word of host_dirty.
static inline void kmig_host_wrote_word(struct kmig_slot *slot, size_t word, uint64_t bits)
{
    uint64_t window = word * 64 / KMIG_WINDOW_PAGES;

    __atomic_fetch_or(&slot->host_dirty[word], bits, __ATOMIC_RELEASE);
    kmig_bits_set_range_atomic(slot->host_windows, window, window + 1);
}

// A round begins; a first one has nothing to build upon.
void kmig_delta_begin(struct kmig_delta *delta, bool first);

// Forget gfn: nobody knows any more what the other side holds.
void kmig_delta_drop(struct kmig_delta *delta, uint64_t gfn);

// Keep a page that hashes to hash and is about to be sent; last_hash is of what was sent before. Returns whether it is to
// be sent as what changed, which then stands in page.
bool kmig_delta_take(struct kmig_delta *delta, uint64_t gfn, uint8_t *page, uint64_t hash, uint64_t last_hash);

// Whether delta runs are in a checked table exactly if bases (the sum of their old pages, on the wire) is not NULL, and are
// to be built upon what lies here: 0, -EPROTO, or -ESTALE.
int kmig_delta_check(const struct kmig_memory *memory, const struct kmig_page_run *run, uint32_t nr_runs,
                     const uint8_t *bases);

void kmig_delta_apply(uint8_t *page, const uint8_t *changed, size_t size_bytes);

// After the pages of a checked run have arrived: hash them, or make them zero.
void kmig_run_received(struct kmig_memory *memory, const struct kmig_page_run *run);

// Turn KVM's logging of one slot on or off; there must be a VM.
int kmig_memory_log_slot(const struct kmig_memory *memory, uint32_t slot_index, bool on);

int kmig_cursor_create(struct kmig_cursor **ret);
void kmig_cursor_destroy(struct kmig_cursor *cursor);

// Take the next pages of the round: a piece of them, which is round's alone from then on. Returns 1, 0 when there are none
// left, or -errno.
int kmig_cursor_next(struct kmig_memory *memory, struct kmig_round *round);

// Everything that round took has been delivered, and there is nothing left to take.
void kmig_cursor_ended(struct kmig_memory *memory, struct kmig_round *round);

// Not everything that round took will be delivered.
static inline void kmig_cursor_failed(struct kmig_round *round)
{
    round->ended = 1;
}

// What was taken is pending again.
void kmig_cursor_put_back(struct kmig_memory *memory, struct kmig_slot *slot, uint64_t first, uint64_t end);

// Forget all hashes: the other side holds nothing yet.
void kmig_memory_forget_hashes(struct kmig_memory *memory);

uint64_t kmig_now_ns(void);

// Whether abort_fd (-1 for none) is readable.
bool kmig_aborted(int abort_fd);

// Sleep until at_ns of kmig_now_ns; -ECANCELED when abort_fd became readable before.
int kmig_sleep_until(uint64_t at_ns, int abort_fd);

// Add to a counter that another thread may be reading.
static inline void kmig_count(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

#endif
