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

// Nothing is left to take. A connection is at its end when its last chunk has gone too.
static int end_of_round(struct kmig_memory *memory, struct kmig_round *round, const struct kmig_chunk *chunk)
{
    if (chunk->nr_runs)
        return 1;
    kmig_cursor_ended(memory, round);
    return 0;
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
        if (round->page == round->piece_end) {
            int rc = kmig_cursor_next(memory, round);
            if (rc < 0)
                kmig_round_put_back(memory, round, chunk);
            if (rc <= 0)
                return rc < 0 ? rc : end_of_round(memory, round, chunk);
        }
        round->page = kmig_bits_next(memory->slot[round->slot].pending, round->page, round->piece_end);
        if (round->page == round->piece_end)
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
    kmig_cursor_failed(round);
    kmig_count(&round->pages_delta, -(uint64_t)chunk->nr_delta_pages);
    for (uint32_t i = 0; i < chunk->nr_runs; i++) {
        const struct kmig_page_run *run = &chunk->run[i];
        struct kmig_slot *slot = kmig_memory_slot(memory, run->gfn);
        uint64_t first = run->gfn - slot->base_gfn;

        kmig_cursor_put_back(memory, slot, first, first + run->nr_pages);
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
