// Which pages a round copies next, window by window, shared out among the connections that copy it.
#include <stdlib.h>
#include <string.h>

#include "bits.h"
#include "internal.h"

// Where a round stands. Its connections take pieces off it under the lock: a piece is a number of whole words of the
// pending bitmap, so that no two of them write to one word.
struct kmig_cursor {
    pthread_mutex_t lock;
    uint32_t nr_open;          // connections that have not come to the end
    uint32_t slot;
    uint64_t page;
    uint64_t window_end;
};

int kmig_cursor_create(struct kmig_cursor **ret)
{
    struct kmig_cursor *cursor = calloc(1, sizeof(*cursor));

    if (!cursor)
        return -ENOMEM;
    pthread_mutex_init(&cursor->lock, NULL);
    *ret = cursor;
    return 0;
}

void kmig_cursor_destroy(struct kmig_cursor *cursor)
{
    if (!cursor)
        return;
    pthread_mutex_destroy(&cursor->lock);
    free(cursor);
}

static void begin_counting(struct kmig_round *round)
{
    uint64_t *const counters[] = {&round->pages_total, &round->pages_done,    &round->pages_zero, &round->pages_sent,
                                  &round->pages_cleared, &round->bytes_sent, &round->busy_ns, &round->pages_delta};

    for (size_t i = 0; i < sizeof(counters) / sizeof(*counters); i++)
        __atomic_store_n(counters[i], 0, __ATOMIC_RELAXED);
    round->slot = round->ended = 0;
    round->page = round->piece_end = 0;
}

void kmig_round_begin(struct kmig_memory *memory, struct kmig_round *round)
{
    struct kmig_cursor *cursor = memory->cursor;

    begin_counting(round);
    cursor->nr_open = 1;
    cursor->slot = 0;
    cursor->page = cursor->window_end = 0;
    if (round->first)
        kmig_memory_forget_hashes(memory);
    if (round->delta)
        kmig_delta_begin(round->delta, round->first);
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        // Pending until its window comes up: a round that is broken off has then forgotten nothing.
        if (round->first)
            kmig_slot_all_pending(&memory->slot[i]);
        else
            kmig_count(&round->pages_total, kmig_slot_count_pending(&memory->slot[i]));
    }
}

void kmig_round_join(struct kmig_memory *memory, struct kmig_round *round)
{
    begin_counting(round);
    memory->cursor->nr_open++;
}

// Take the window's pending pages out of the log: KVM's, which write-protects them again, and the VMM's.
static int clear_window(struct kmig_memory *memory, uint32_t slot_index, uint64_t first, uint64_t end)
{
    struct kmig_slot *slot = &memory->slot[slot_index];

    if (kmig_bits_next(slot->pending, first, end) == end)
        return 0;
    for (uint64_t word = first / 64; word < kmig_bits_words(end); word++)
        if (__atomic_load_n(&slot->host_dirty[word], __ATOMIC_RELAXED) & slot->pending[word])
            __atomic_fetch_and(&slot->host_dirty[word], ~slot->pending[word], __ATOMIC_SEQ_CST);
    if (KMIG_FAULT("copy-before-clear"))
        return 0;
    return kmig_dirty_clear(memory, slot_index, first, end - first, slot->pending + first / 64);
}

// Take what is not resident off pending. Returns how many pages stay, or -errno.
static long reduce_to_resident(struct kmig_memory *memory, uint64_t first, uint64_t end)
{
    uint64_t resident[KMIG_WINDOW_PAGES / 64] = {0};
    uint64_t *pending = memory->slot[memory->cursor->slot].pending;
    long rc = kmig_memory_resident(memory, memory->cursor->slot, first, end - first, resident);

    if (rc < 0)
        return rc;
    for (uint64_t word = first / 64; word < kmig_bits_words(end); word++)
        pending[word] &= resident[word - first / 64];
    return (long)kmig_bits_count(pending, first, end);
}

// Prepare the window first..end of the slot in which the cursor stands.
//
// The order is what keeps a page from being lost. Clearing comes before anything else: a page that is written after it
// is in the log again, so whatever is copied later than this is either the last version or will come up once more
// (KVM api.rst, KVM_CLEAR_DIRTY_LOG; kernel commit 2a31b9db1535). Residency is asked after clearing for the same
// reason: a page first touched before the clear is resident by then, one first touched after it is in the log.
static int open_window(struct kmig_memory *memory, struct kmig_round *round, uint64_t first, uint64_t end)
{
    struct kmig_slot *slot = &memory->slot[memory->cursor->slot];
    uint64_t window = first / KMIG_WINDOW_PAGES;
    bool was_empty = kmig_bits_test(slot->empty_windows, window);
    uint64_t counted = round->first ? 0 : kmig_bits_count(slot->pending, first, end);

    // What was found in an empty window is in the log as all of it is: now it is cleared there.
    if (was_empty)
        kmig_slot_pending(slot, first, end);
    kmig_bits_unset(slot->empty_windows, window);
    int rc = clear_window(memory, memory->cursor->slot, first, end);
    if (rc < 0 || !(round->first || was_empty))
        return rc;
    long resident = reduce_to_resident(memory, first, end);
    if (resident < 0)
        return (int)resident;
    kmig_count(&round->pages_total, (uint64_t)resident - counted);
    return 0;
}

// Whether nothing is resident in a window of the first round. Then clearing it in the log, which takes longer the more
// pages there are and not the more of them are in use, is left for when something is: kmig_slot_find_touched looks.
static int skip_if_empty(struct kmig_memory *memory, uint64_t first, uint64_t end)
{
    uint64_t resident[KMIG_WINDOW_PAGES / 64] = {0};
    struct kmig_slot *slot = &memory->slot[memory->cursor->slot];
    long rc = kmig_memory_resident(memory, memory->cursor->slot, first, end - first, resident);

    if (rc != 0 || memory->no_pagemap_scan)
        return rc < 0 ? (int)rc : 0;
    memset(slot->pending + first / 64, 0, (kmig_bits_words(end) - first / 64) * 8);
    kmig_bits_set(slot->empty_windows, first / KMIG_WINDOW_PAGES);
    return 1;
}

#ifdef KMIG_PLANTED_FAULTS
// For "copy-before-clear": what should have happened before the window was copied.
static int close_window(struct kmig_memory *memory)
{
    const struct kmig_cursor *cursor = memory->cursor;
    uint64_t first = cursor->window_end ? (cursor->window_end - 1) / KMIG_WINDOW_PAGES * KMIG_WINDOW_PAGES : 0;
    uint64_t all[KMIG_WINDOW_PAGES / 64];

    if (!KMIG_FAULT("copy-before-clear") || !cursor->window_end)
        return 0;
    memset(all, 0xff, sizeof(all));
    return kmig_dirty_clear(memory, cursor->slot, first, cursor->window_end - first, all);
}
#endif

// Go on to the next window in which anything is pending. Returns 1, or 0 when the cursor has been through all slots.
static int next_window(struct kmig_memory *memory, struct kmig_round *round)
{
    struct kmig_cursor *cursor = memory->cursor;
    int rc = 0;

    if (kmig_aborted(round->abort_fd))
        return -ECANCELED;
#ifdef KMIG_PLANTED_FAULTS
    rc = close_window(memory);
    if (rc < 0)
        return rc;
#endif
    for (; cursor->slot < memory->nr_slots; cursor->slot++) {
        const struct kmig_slot *slot = &memory->slot[cursor->slot];
        uint64_t nr_windows = kmig_windows_of(slot->nr_pages);
        uint64_t window = kmig_bits_next(slot->pending_windows, kmig_windows_of(cursor->window_end), nr_windows);
        if (window < nr_windows) {
            cursor->page = window * KMIG_WINDOW_PAGES;
            break;
        }
        cursor->page = cursor->window_end = 0;
    }
    if (cursor->slot == memory->nr_slots)
        return 0;
    uint64_t end = kmig_window_end(&memory->slot[cursor->slot], cursor->page);
    rc = round->first ? skip_if_empty(memory, cursor->page, end) : 0;
    if (rc == 0)
        rc = open_window(memory, round, cursor->page, end);
    if (rc < 0)
        return rc;
    cursor->window_end = end;
    if (rc > 0)
        cursor->page = end;
    return 1;
}

// Where the piece ends that begins at page: with as many words as surely fit into one chunk.
static uint64_t end_of_piece(const struct kmig_slot *slot, uint64_t page, uint64_t window_end)
{
    uint64_t word = page / 64, last = kmig_bits_words(window_end), nr_pages = 0;

    for (; word < last; word++) {
        nr_pages += (uint64_t)__builtin_popcountll(slot->pending[word]);
        if (nr_pages > KMIG_CHUNK_PAGES)
            break;
    }
    return word < last ? word * 64 : window_end;
}

static int take_piece(struct kmig_memory *memory, struct kmig_round *round)
{
    struct kmig_cursor *cursor = memory->cursor;

    for (;;) {
        if (cursor->page == cursor->window_end) {
            int rc = next_window(memory, round);
            if (rc <= 0)
                return rc;
        }
        const struct kmig_slot *slot = &memory->slot[cursor->slot];
        uint64_t page = kmig_bits_next(slot->pending, cursor->page, cursor->window_end);
        cursor->page = page;
        if (page == cursor->window_end)
            continue;
        round->slot = cursor->slot;
        round->page = page;
        round->piece_end = cursor->page = end_of_piece(slot, page, cursor->window_end);
        return 1;
    }
}

int kmig_cursor_next(struct kmig_memory *memory, struct kmig_round *round)
{
    pthread_mutex_lock(&memory->cursor->lock);
    int rc = take_piece(memory, round);
    if (KMIG_FAULT("lose-piece") && rc > 0 && round->pages_done)
        rc = take_piece(memory, round);
    pthread_mutex_unlock(&memory->cursor->lock);
    return rc;
}

// Only now: as long as a connection may fail, and what it took be pending again, every window counts as one that has
// pending pages.
void kmig_cursor_ended(struct kmig_memory *memory, struct kmig_round *round)
{
    if (round->ended)
        return;
    round->ended = 1;
    pthread_mutex_lock(&memory->cursor->lock);
    if (--memory->cursor->nr_open == 0)
        for (uint32_t i = 0; i < memory->nr_slots; i++)
            memset(memory->slot[i].pending_windows, 0, kmig_bits_words(kmig_windows_of(memory->slot[i].nr_pages)) * 8);
    pthread_mutex_unlock(&memory->cursor->lock);
}

void kmig_cursor_put_back(struct kmig_memory *memory, struct kmig_slot *slot, uint64_t first, uint64_t end)
{
    pthread_mutex_lock(&memory->cursor->lock);
    kmig_slot_pending(slot, first, end);
    pthread_mutex_unlock(&memory->cursor->lock);
}
