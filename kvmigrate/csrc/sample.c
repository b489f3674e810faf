// A look at the pages that are still to be sent: what would a compressor make of them?
#include <string.h>

#include "bits.h"
#include "hash.h"
#include "internal.h"

#define WINDOW_PAGES 512
#define PIECE_PAGES 16
#define MAX_PIECES 256

static uint32_t reverse_byte(uint32_t value)
{
    uint32_t reversed = 0;
    for (int bit = 0; bit < 8; bit++)
        reversed |= (value >> bit & 1) << (7 - bit);
    return reversed;
}

// Copy up to nr_pages pending pages of one window that may hold something. Returns how many, or -errno.
static long sample_window(struct kmig_memory *memory, uint32_t slot_index, uint64_t first, uint8_t *data,
                          uint64_t nr_pages)
{
    const struct kmig_slot *slot = &memory->slot[slot_index];
    uint64_t end = slot->nr_pages - first < WINDOW_PAGES ? slot->nr_pages : first + WINDOW_PAGES;
    uint64_t resident[WINDOW_PAGES / 64] = {0};
    long taken = 0;

    if (kmig_bits_next(slot->pending, first, end) == end)
        return 0;
    long rc = kmig_memory_resident(memory, slot_index, first, end - first, resident);
    if (rc <= 0)
        return rc;
    for (uint64_t page = first; page < end && (uint64_t)taken < nr_pages && taken < PIECE_PAGES; page++) {
        uint8_t *hva = slot->hva + page * KMIG_PAGE_BYTES;
        if (kmig_bits_test(resident, page - first) && kmig_bits_test(slot->pending, page) && !kmig_page_is_zero(hva))
            memcpy(data + taken++ * KMIG_PAGE_BYTES, hva, KMIG_PAGE_BYTES);
    }
    return taken;
}

static uint64_t windows_of(const struct kmig_slot *slot)
{
    return (slot->nr_pages + WINDOW_PAGES - 1) / WINDOW_PAGES;
}

long kmig_memory_sample(struct kmig_memory *memory, uint8_t *data, uint64_t nr_pages)
{
    uint64_t nr_windows = 0, taken = 0;

    for (uint32_t i = 0; i < memory->nr_slots; i++)
        nr_windows += windows_of(&memory->slot[i]);
    // In the order of the reversed bits every beginning of the walk is spread over all of memory.
    for (uint32_t step = 0; step < MAX_PIECES && taken < nr_pages; step++) {
        uint64_t at = reverse_byte(step);
        uint64_t window = at * nr_windows / MAX_PIECES;
        // In a small guest several places are one window, which counts once.
        if (at && (at - 1) * nr_windows / MAX_PIECES == window)
            continue;
        uint32_t slot = 0;
        for (; window >= windows_of(&memory->slot[slot]); slot++)
            window -= windows_of(&memory->slot[slot]);
        long rc = sample_window(memory, slot, window * WINDOW_PAGES, data + taken * KMIG_PAGE_BYTES, nr_pages - taken);
        if (rc < 0)
            return rc;
        taken += (uint64_t)rc;
    }
    return (long)taken;
}
