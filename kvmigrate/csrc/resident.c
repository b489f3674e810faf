// Which pages of guest RAM may hold anything but zeros, asked of the kernel and found without reading a page.
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "hash.h"
#include "internal.h"

#define PAGEMAP_BATCH 1024
#define SCAN_REGIONS 64
#define HUGE_PAGES 512
// Bits of a word of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_SWAPPED (UINT64_C(1) << 62)

// PAGEMAP_SCAN as linux/fs.h has it from 6.7 on; the headers that this is built with may be older than the kernel.
#define SCAN_PRESENT (UINT64_C(1) << 3)
#define SCAN_SWAPPED (UINT64_C(1) << 4)

struct scan_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct scan_arg {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};

_Static_assert(sizeof(struct scan_region) == 24 && sizeof(struct scan_arg) == 96, "linux/fs.h");

#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)

// Set the bits of one region's pages in bitmap, which begins at page first of a slot, and of their windows, if wanted.
static void note(const struct scan_region *region, uint64_t base, uint64_t first, uint64_t *bitmap, uint64_t *windows)
{
    uint64_t from = (region->start - base) / KMIG_PAGE_BYTES, to = (region->end - base) / KMIG_PAGE_BYTES;

    kmig_bits_set_range(bitmap, from, to);
    if (windows)
        kmig_bits_set_range(windows, (first + from) / KMIG_WINDOW_PAGES, kmig_windows_of(first + to));
}

// Ask for ranges: the kernel steps over what has no page tables at once, so that empty memory costs nothing. Returns
// -ENOTTY or -EINVAL where it does not know the call.
static int scan(const struct kmig_memory *memory, const struct kmig_slot *slot, uint64_t first, uint64_t end,
                uint64_t *bitmap, uint64_t *windows)
{
    struct scan_region region[SCAN_REGIONS];
    uint64_t base = (uintptr_t)slot->hva + first * KMIG_PAGE_BYTES;
    struct scan_arg arg = {
        .size = sizeof(arg),
        .start = base,
        .end = (uintptr_t)slot->hva + end * KMIG_PAGE_BYTES,
        .vec = (uintptr_t)region,
        .vec_len = SCAN_REGIONS,
        .category_anyof_mask = SCAN_PRESENT | SCAN_SWAPPED,
        .return_mask = SCAN_PRESENT | SCAN_SWAPPED,
    };

    for (; arg.start < arg.end; arg.start = arg.walk_end) {
        int nr = kmig_ioctl(memory->pagemap_fd, SCAN_IOCTL, &arg);
        if (nr < 0)
            return nr;
        for (int i = 0; i < nr; i++)
            note(&region[i], base, first, bitmap, windows);
    }
    return 0;
}

// Set the bits of up to PAGEMAP_BATCH pages, asked for one by one.
static int read_batch(const struct kmig_memory *memory, const struct kmig_slot *slot, uint64_t first, uint64_t end,
                      uint64_t *bitmap)
{
    uint64_t entry[PAGEMAP_BATCH];
    uint64_t at = (uintptr_t)slot->hva / KMIG_PAGE_BYTES + first;
    ssize_t want = (ssize_t)((end - first) * sizeof(*entry));
    ssize_t got = pread(memory->pagemap_fd, entry, (size_t)want, (off_t)(at * sizeof(*entry)));

    if (got != want)
        return got < 0 ? -errno : -EIO;
    for (uint64_t page = first; page < end; page++)
        if (entry[page - first] & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED))
            kmig_bits_set(bitmap, page - first);
    return 0;
}

static int read_all(const struct kmig_memory *memory, const struct kmig_slot *slot, uint64_t first, uint64_t end,
                    uint64_t *bitmap)
{
    for (uint64_t page = first; page < end; page += PAGEMAP_BATCH) {
        uint64_t batch_end = end - page > PAGEMAP_BATCH ? page + PAGEMAP_BATCH : end;
        int rc = read_batch(memory, slot, page, batch_end, bitmap + (page - first) / 64);
        if (rc < 0)
            return rc;
    }
    return 0;
}

// Add the pages that a memory file holds and the page tables do not tell of: those that were swapped out or made part of a
// huge page lose their entries there (Documentation/admin-guide/mm/pagemap.rst, "Exceptions for Shared Memory"). Nearly all
// are found before, so that this asks once or twice.
static int seek(const struct kmig_slot *slot, uint64_t first, uint64_t end, uint64_t *bitmap, uint64_t *windows)
{
    uint64_t nr_pages = end - first, page;

    for (uint64_t at = kmig_bits_next_unset(bitmap, 0, nr_pages); at < nr_pages;
         at = kmig_bits_next_unset(bitmap, page, nr_pages)) {
        off_t found = lseek(slot->fd, (off_t)((first + at) * KMIG_PAGE_BYTES), SEEK_DATA);
        if (found < 0)
            return errno == ENXIO ? 0 : -errno;
        page = (uint64_t)found / KMIG_PAGE_BYTES - first;
        if (page >= nr_pages)
            return 0;
        kmig_bits_set(bitmap, page);
        if (windows)
            kmig_bits_set(windows, (first + page) / KMIG_WINDOW_PAGES);
    }
    return 0;
}

int kmig_slot_resident(struct kmig_memory *memory, const struct kmig_slot *slot, uint64_t first, uint64_t end,
                       uint64_t *bitmap)
{
    int rc = memory->no_pagemap_scan ? -ENOTTY : scan(memory, slot, first, end, bitmap, NULL);

    if (rc == -ENOTTY || rc == -EINVAL) {
        memory->no_pagemap_scan = 1;
        rc = read_all(memory, slot, first, end, bitmap);
    }
    if (rc == 0 && memory->backend == KMIG_BACKEND_MEMFD)
        rc = seek(slot, first, end, bitmap, NULL);
    return rc;
}

long kmig_memory_resident(struct kmig_memory *memory, uint32_t slot_index, uint64_t first, uint64_t nr_pages,
                          uint64_t *bitmap)
{
    if (slot_index >= memory->nr_slots)
        return -EINVAL;
    const struct kmig_slot *slot = &memory->slot[slot_index];
    if (first % 64 || first > slot->nr_pages || nr_pages > slot->nr_pages - first)
        return -EINVAL;
    uint64_t end = first + nr_pages;
    int rc = kmig_slot_resident(memory, slot, first, end, bitmap);
    if (rc < 0)
        return rc;
    for (uint64_t word = first / 64; word < kmig_bits_words(end); word++)
        bitmap[word - first / 64] |= slot->backed[word] & kmig_bits_mask(word, first, end);
    return (long)kmig_bits_count(bitmap, 0, nr_pages);
}

struct runs {
    uint64_t *first_and_nr;
    uint64_t nr;
    uint64_t most;
};

// Add pages to the last run, or as a new one. False when there is no room.
static bool add_run(struct runs *runs, uint64_t gfn, uint64_t nr_pages)
{
    uint64_t *next = runs->first_and_nr + 2 * runs->nr;

    if (runs->nr && next[-2] + next[-1] == gfn) {
        next[-1] += nr_pages;
        return true;
    }
    if (runs->nr == runs->most)
        return false;
    runs->nr++;
    next[0] = gfn;
    next[1] = nr_pages;
    return true;
}

// The huge pages of the window that begins at page first. Returns 1, 0 when there is no more room, or -errno.
static int add_window(struct kmig_memory *memory, uint32_t slot_index, uint64_t first, struct runs *runs)
{
    uint64_t resident[KMIG_WINDOW_PAGES / 64] = {0};
    const struct kmig_slot *slot = &memory->slot[slot_index];
    uint64_t end = kmig_window_end(slot, first);
    long rc = kmig_memory_resident(memory, slot_index, first, end - first, resident);

    for (uint64_t page = first; rc > 0 && page < end; page += HUGE_PAGES) {
        uint64_t nr_pages = end - page < HUGE_PAGES ? end - page : HUGE_PAGES;
        uint64_t at = page - first;
        if (kmig_bits_next(resident, at, at + nr_pages) < at + nr_pages &&
            !add_run(runs, slot->base_gfn + page, nr_pages))
            return 0;
    }
    return rc < 0 ? (int)rc : 1;
}

long kmig_memory_resident_runs(struct kmig_memory *memory, uint64_t *first_and_nr, uint64_t most)
{
    struct runs runs = {first_and_nr, 0, most};
    int rc = 1;

    for (uint32_t i = 0; i < memory->nr_slots && rc > 0; i++)
        for (uint64_t first = 0; first < memory->slot[i].nr_pages && rc > 0; first += KMIG_WINDOW_PAGES)
            rc = add_window(memory, i, first, &runs);
    return rc < 0 ? rc : (long)runs.nr;
}

int kmig_slot_find_touched(const struct kmig_memory *memory, struct kmig_slot *slot)
{
    uint64_t nr_windows = kmig_windows_of(slot->nr_pages), end;

    for (uint64_t window = 0; (window = kmig_bits_next(slot->empty_windows, window, nr_windows)) < nr_windows; window = end) {
        end = kmig_bits_next_unset(slot->empty_windows, window, nr_windows);
        uint64_t first = window * KMIG_WINDOW_PAGES;
        uint64_t last = end == nr_windows ? slot->nr_pages : end * KMIG_WINDOW_PAGES;
        uint64_t *pending = slot->pending + first / 64;
        int rc = scan(memory, slot, first, last, pending, slot->pending_windows);
        if (rc == 0 && memory->backend == KMIG_BACKEND_MEMFD)
            rc = seek(slot, first, last, pending, slot->pending_windows);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int kmig_memory_hash_all(struct kmig_memory *memory, uint32_t slot_index, uint64_t *hashes)
{
    if (slot_index >= memory->nr_slots)
        return -EINVAL;
    const struct kmig_slot *slot = &memory->slot[slot_index];
    uint64_t *resident = calloc(kmig_bits_words(slot->nr_pages), sizeof(*resident));
    if (!resident)
        return -ENOMEM;
    long rc = kmig_memory_resident(memory, slot_index, 0, slot->nr_pages, resident);
    if (rc >= 0)
        for (uint64_t page = 0; page < slot->nr_pages; page++)
            hashes[page] = kmig_bits_test(resident, page) ? kmig_page_hash(slot->hva + page * KMIG_PAGE_BYTES) : 0;
    free(resident);
    return rc < 0 ? (int)rc : 0;
}
