// Rounds: which pages to copy next, and what came of them.
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "bits.h"
#include "hash.h"
#include "internal.h"

#define PACE_NS 10000000

uint64_t kmig_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

bool kmig_aborted(int abort_fd)
{
    struct pollfd poller = {.fd = abort_fd, .events = POLLIN};
    return abort_fd >= 0 && poll(&poller, 1, 0) > 0;
}

int kmig_sleep_until(uint64_t at_ns, int abort_fd)
{
    struct pollfd poller = {.fd = abort_fd, .events = POLLIN};

    for (uint64_t now = kmig_now_ns(); now < at_ns; now = kmig_now_ns()) {
        struct timespec left = {(time_t)((at_ns - now) / 1000000000), (long)((at_ns - now) % 1000000000)};
        int rc = ppoll(&poller, 1, &left, NULL);
        if (rc > 0)
            return -ECANCELED;
        if (rc < 0 && errno != EINTR)
            return -errno;
    }
    return 0;
}

// A send may start when all before it have had their time. Time that was not used is not saved up for later: a burst
// after a stall would break the cap just when the link is busy.
int kmig_round_pace(struct kmig_round *round, uint64_t size_bytes)
{
    if (!round->bandwidth)
        return 0;
    int rc = kmig_sleep_until(round->next_send_ns, round->abort_fd);
    if (rc)
        return rc;
    uint64_t now = kmig_now_ns();
    uint64_t earliest = now > PACE_NS ? now - PACE_NS : 0;
    uint64_t from = round->next_send_ns > earliest ? round->next_send_ns : earliest;
    round->next_send_ns = from + (uint64_t)((double)size_bytes * 1e9 / (double)round->bandwidth);
    return 0;
}

// Under a cap a chunk is what may leave within a hundredth of a second, so that the stream stays smooth.
static uint32_t chunk_limit(const struct kmig_round *round)
{
    uint64_t smooth = round->bandwidth / (1000000000 / PACE_NS) / KMIG_PAGE_BYTES;
    if (!round->bandwidth || smooth >= KMIG_CHUNK_PAGES)
        return KMIG_CHUNK_PAGES;
    return smooth ? (uint32_t)smooth : 1;
}

void kmig_memory_forget_hashes(struct kmig_memory *memory)
{
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        struct kmig_slot *slot = &memory->slot[i];
        uint64_t size_bytes = slot->nr_pages * sizeof(*slot->hash);
        // Gives the pages back: they read as zeros again, and a large guest's table need not be written to.
        if (madvise(slot->hash, size_bytes, MADV_DONTNEED) < 0)
            memset(slot->hash, 0, size_bytes);
    }
    memory->digest = 0;
    memory->nr_hashed = 0;
}

void kmig_round_begin(struct kmig_memory *memory, struct kmig_round *round)
{
    uint64_t *const counters[] = {&round->pages_total, &round->pages_done,    &round->pages_zero, &round->pages_sent,
                                  &round->pages_cleared, &round->bytes_sent, &round->busy_ns, &round->pages_delta};

    for (size_t i = 0; i < sizeof(counters) / sizeof(*counters); i++)
        __atomic_store_n(counters[i], 0, __ATOMIC_RELAXED);
    round->slot = 0;
    round->page = 0;
    round->window_end = 0;
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
static long reduce_to_resident(struct kmig_memory *memory, const struct kmig_round *round, uint64_t first, uint64_t end)
{
    uint64_t resident[KMIG_WINDOW_PAGES / 64] = {0};
    uint64_t *pending = memory->slot[round->slot].pending;
    long rc = kmig_memory_resident(memory, round->slot, first, end - first, resident);

    if (rc < 0)
        return rc;
    for (uint64_t word = first / 64; word < kmig_bits_words(end); word++)
        pending[word] &= resident[word - first / 64];
    return (long)kmig_bits_count(pending, first, end);
}

// Prepare the window first..end of the slot in which the round stands.
//
// The order is what keeps a page from being lost. Clearing comes before anything else: a page that is written after it
// is in the log again, so whatever is copied later than this is either the last version or will come up once more
// (KVM api.rst, KVM_CLEAR_DIRTY_LOG; kernel commit 2a31b9db1535). Residency is asked after clearing for the same
// reason: a page first touched before the clear is resident by then, one first touched after it is in the log.
static int open_window(struct kmig_memory *memory, struct kmig_round *round, uint64_t first, uint64_t end)
{
    struct kmig_slot *slot = &memory->slot[round->slot];
    uint64_t window = first / KMIG_WINDOW_PAGES;
    bool was_empty = kmig_bits_test(slot->empty_windows, window);
    uint64_t counted = round->first ? 0 : kmig_bits_count(slot->pending, first, end);

    // What was found in an empty window is in the log as all of it is: now it is cleared there.
    if (was_empty)
        kmig_slot_pending(slot, first, end);
    kmig_bits_unset(slot->empty_windows, window);
    int rc = clear_window(memory, round->slot, first, end);
    if (rc < 0 || !(round->first || was_empty))
        return rc;
    long resident = reduce_to_resident(memory, round, first, end);
    if (resident < 0)
        return (int)resident;
    kmig_count(&round->pages_total, (uint64_t)resident - counted);
    return 0;
}

// Whether nothing is resident in a window of the first round. Then clearing it in the log, which takes longer the more
// pages there are and not the more of them are in use, is left for when something is: kmig_slot_find_touched looks.
static int skip_if_empty(struct kmig_memory *memory, struct kmig_round *round, uint64_t first, uint64_t end)
{
    uint64_t resident[KMIG_WINDOW_PAGES / 64] = {0};
    struct kmig_slot *slot = &memory->slot[round->slot];
    long rc = kmig_memory_resident(memory, round->slot, first, end - first, resident);

    if (rc != 0 || memory->no_pagemap_scan)
        return rc < 0 ? (int)rc : 0;
    memset(slot->pending + first / 64, 0, (kmig_bits_words(end) - first / 64) * 8);
    kmig_bits_set(slot->empty_windows, first / KMIG_WINDOW_PAGES);
    return 1;
}

#ifdef KMIG_PLANTED_FAULTS
// For "copy-before-clear": what should have happened before the window was copied.
static int close_window(struct kmig_memory *memory, const struct kmig_round *round)
{
    uint64_t first = round->window_end ? (round->window_end - 1) / KMIG_WINDOW_PAGES * KMIG_WINDOW_PAGES : 0;
    uint64_t all[KMIG_WINDOW_PAGES / 64];

    if (!KMIG_FAULT("copy-before-clear") || !round->window_end)
        return 0;
    memset(all, 0xff, sizeof(all));
    return kmig_dirty_clear(memory, round->slot, first, round->window_end - first, all);
}
#endif

// Go on to the next window in which anything is pending. Returns 1, or 0 when the round has been through all slots.
static int next_window(struct kmig_memory *memory, struct kmig_round *round)
{
    int rc = 0;

    if (kmig_aborted(round->abort_fd))
        return -ECANCELED;
#ifdef KMIG_PLANTED_FAULTS
    rc = close_window(memory, round);
    if (rc < 0)
        return rc;
#endif
    if (round->window_end)
        kmig_bits_unset(memory->slot[round->slot].pending_windows, (round->window_end - 1) / KMIG_WINDOW_PAGES);
    for (; round->slot < memory->nr_slots; round->slot++) {
        const struct kmig_slot *slot = &memory->slot[round->slot];
        uint64_t nr_windows = kmig_windows_of(slot->nr_pages);
        uint64_t window = kmig_bits_next(slot->pending_windows, kmig_windows_of(round->window_end), nr_windows);
        if (window < nr_windows) {
            round->page = window * KMIG_WINDOW_PAGES;
            break;
        }
        round->page = round->window_end = 0;
    }
    if (round->slot == memory->nr_slots)
        return 0;
    uint64_t end = kmig_window_end(&memory->slot[round->slot], round->page);
    rc = round->first ? skip_if_empty(memory, round, round->page, end) : 0;
    if (rc == 0)
        rc = open_window(memory, round, round->page, end);
    if (rc < 0)
        return rc;
    round->window_end = end;
    if (rc > 0)
        round->page = end;
    return 1;
}

// Append one page, to the last run if it goes on there.
static void append(struct kmig_chunk *chunk, uint64_t gfn, uint32_t kind, uint8_t *hva)
{
    struct kmig_page_run *last = &chunk->run[chunk->nr_runs - (chunk->nr_runs > 0)];

    chunk->nr_data_pages += kind != KMIG_RUN_ZERO;
    if (chunk->nr_runs && last->kind == kind && last->gfn + last->nr_pages == gfn &&
        (kind == KMIG_RUN_ZERO || chunk->hva[chunk->nr_runs - 1] + (uint64_t)last->nr_pages * KMIG_PAGE_BYTES == hva)) {
        last->nr_pages++;
        return;
    }
    chunk->hva[chunk->nr_runs] = kind != KMIG_RUN_ZERO ? hva : NULL;
    chunk->run[chunk->nr_runs++] = (struct kmig_page_run){gfn, 1, kind};
}

// How a page that is not zero goes. Only of what went through the bounce buffer is known what the other side holds: a
// page that is sent from where the guest writes may have torn.
static uint32_t kind_of(struct kmig_round *round, struct kmig_chunk *chunk, uint64_t gfn, uint8_t *bounced,
                        uint64_t hash, uint64_t known)
{
    if (!round->delta || round->first)
        return KMIG_RUN_DATA;
    if (!bounced)
        kmig_delta_drop(round->delta, gfn);
    else if (kmig_delta_take(round->delta, gfn, bounced, hash, known)) {
        chunk->bases += kmig_digest_term(gfn, known);
        chunk->nr_delta_pages++;
        kmig_count(&round->pages_delta, 1);
        return KMIG_RUN_DELTA;
    }
    return KMIG_RUN_DATA;
}

// Take one page off pending and decide what becomes of it. Returns how many pages the chunk grew by.
static uint32_t take_page(struct kmig_memory *memory, struct kmig_round *round, struct kmig_chunk *chunk,
                          uint8_t *bounce)
{
    struct kmig_slot *slot = &memory->slot[round->slot];
    uint64_t page = round->page;
    uint8_t *hva = slot->hva + page * KMIG_PAGE_BYTES;

    kmig_bits_unset(slot->pending, page);
    kmig_count(&round->pages_done, 1);
    if (KMIG_FAULT("drop-page-per-round") && round->pages_done == 1)
        return 0;
    if (bounce)
        hva = memcpy(bounce + (size_t)chunk->nr_data_pages * KMIG_PAGE_BYTES, hva, KMIG_PAGE_BYTES);
    uint64_t known = slot->hash[page];
    uint64_t hash = kmig_page_hash(hva);
    if (KMIG_FAULT("zero-when-not") && round->pages_done == 1)
        hash = 0;
    kmig_hash_set(memory, slot, page, hash);
    if (hash == 0 && known == 0) {
        kmig_count(&round->pages_zero, 1);
        return 0;
    }
    kmig_count(hash ? &round->pages_sent : &round->pages_cleared, 1);
    uint64_t gfn = slot->base_gfn + page;
    uint32_t kind = hash ? kind_of(round, chunk, gfn, bounce ? hva : NULL, hash, known) : KMIG_RUN_ZERO;
    append(chunk, gfn, kind, hva);
    return 1;
}

int kmig_round_next(struct kmig_memory *memory, struct kmig_round *round, struct kmig_chunk *chunk, uint8_t *bounce)
{
    uint32_t limit = chunk_limit(round);
    uint32_t nr_pages = 0;

    chunk->nr_runs = 0;
    chunk->nr_data_pages = 0;
    chunk->nr_delta_pages = 0;
    chunk->bases = 0;
    while (nr_pages < limit) {
        if (round->page == round->window_end) {
            int rc = next_window(memory, round);
            if (rc < 0)
                kmig_round_put_back(memory, round, chunk);
            if (rc <= 0)
                return rc < 0 ? rc : chunk->nr_runs > 0;
        }
        round->page = kmig_bits_next(memory->slot[round->slot].pending, round->page, round->window_end);
        if (round->page == round->window_end)
            continue;
        nr_pages += take_page(memory, round, chunk, bounce);
        round->page++;
    }
    return 1;
}

void kmig_round_put_back(struct kmig_memory *memory, struct kmig_round *round, const struct kmig_chunk *chunk)
{
    if (KMIG_FAULT("forget-put-back"))
        return;
    kmig_count(&round->pages_delta, -(uint64_t)chunk->nr_delta_pages);
    for (uint32_t i = 0; i < chunk->nr_runs; i++) {
        const struct kmig_page_run *run = &chunk->run[i];
        struct kmig_slot *slot = kmig_memory_slot(memory, run->gfn);
        uint64_t first = run->gfn - slot->base_gfn;

        kmig_slot_pending(slot, first, first + run->nr_pages);
        // The other side may hold the old bytes: a hash that is not 0 has the page announced again if it is still zero.
        if (run->kind == KMIG_RUN_ZERO)
            for (uint64_t page = first; page < first + run->nr_pages; page++)
                kmig_hash_set(memory, slot, page, 1);
        else if (round->delta)
            for (uint64_t gfn = run->gfn; gfn < run->gfn + run->nr_pages; gfn++)
                kmig_delta_drop(round->delta, gfn);
        kmig_count(run->kind != KMIG_RUN_ZERO ? &round->pages_sent : &round->pages_cleared, -(uint64_t)run->nr_pages);
        kmig_count(&round->pages_done, -(uint64_t)run->nr_pages);
    }
}

long kmig_table_check(const struct kmig_memory *memory, const struct kmig_page_run *run, uint32_t nr_runs, uint32_t last_kind)
{
    uint64_t next_gfn = 0, nr_pages = 0, nr_data = 0;

    if (nr_runs > KMIG_CHUNK_PAGES)
        return -EINVAL;
    for (uint32_t i = 0; i < nr_runs; i++) {
        const struct kmig_slot *slot = kmig_memory_slot(memory, run[i].gfn);
        if (!slot || run[i].gfn < next_gfn || !run[i].nr_pages || run[i].kind > last_kind)
            return -EINVAL;
        if (run[i].nr_pages > slot->nr_pages - (run[i].gfn - slot->base_gfn))
            return -EINVAL;
        next_gfn = run[i].gfn + run[i].nr_pages;
        nr_pages += run[i].nr_pages;
        nr_data += run[i].kind != KMIG_RUN_ZERO ? run[i].nr_pages : 0;
    }
    return nr_pages > KMIG_CHUNK_PAGES ? -EINVAL : (long)nr_data;
}

void kmig_run_received(struct kmig_memory *memory, const struct kmig_page_run *run)
{
    struct kmig_slot *slot = kmig_memory_slot(memory, run->gfn);
    uint64_t first = run->gfn - slot->base_gfn;

    for (uint64_t page = first; page < first + run->nr_pages; page++) {
        uint8_t *hva = slot->hva + page * KMIG_PAGE_BYTES;
        uint64_t hash = run->kind != KMIG_RUN_ZERO ? kmig_page_hash(hva) : 0;
        // Looked at first: a page that is zero already need not be allocated to become so.
        if (run->kind == KMIG_RUN_ZERO && !kmig_page_is_zero(hva))
            memset(hva, 0, KMIG_PAGE_BYTES);
        kmig_hash_set(memory, slot, page, hash);
    }
}

int kmig_table_apply(struct kmig_memory *memory, const struct kmig_page_run *run, uint32_t nr_runs, const uint8_t *data)
{
    for (uint32_t i = 0; i < nr_runs; i++) {
        size_t size_bytes = (size_t)run[i].nr_pages * KMIG_PAGE_BYTES;
        uint8_t *hva = kmig_memory_hva(memory, run[i].gfn);
        if (run[i].kind == KMIG_RUN_DATA)
            memcpy(hva, data, size_bytes);
        else if (run[i].kind == KMIG_RUN_DELTA)
            kmig_delta_apply(hva, data, size_bytes);
        data += run[i].kind != KMIG_RUN_ZERO ? size_bytes : 0;
        kmig_run_received(memory, &run[i]);
    }
    return 0;
}
