// Pages as they were last sent, to send them again as what changed. See api/delta.h.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "hash.h"
#include "internal.h"

#define NR_WAYS 8
#define PAGE_WORDS (KMIG_PAGE_BYTES / 8)
// With more of a page's words changed the XOR of both is no smaller than the page.
#define MOST_CHANGED (PAGE_WORDS / 2)

struct kmig_delta {
    pthread_mutex_t lock;      // the connections of a round share it
    uint64_t nr_sets;
    uint64_t round;            // counts the rounds, so that pages in use are told from old ones
    uint64_t nr_kept;
    uint64_t nr_bytes;
    struct kmig_kept *kept;
    uint8_t *pages;
};

struct kmig_kept {
    uint64_t gfn_1;            // gfn + 1, or 0 when nothing is kept here
    uint64_t hash;
    uint64_t round;            // in which it was sent last
};

int kmig_delta_create(uint64_t size_bytes, struct kmig_delta **ret)
{
    uint64_t nr_sets = size_bytes / (NR_WAYS * (KMIG_PAGE_BYTES + sizeof(struct kmig_kept)));

    if (size_bytes < 65536)
        return -EINVAL;
    struct kmig_delta *delta = calloc(1, sizeof(*delta));
    if (!delta)
        return -ENOMEM;
    pthread_mutex_init(&delta->lock, NULL);
    uint64_t page_bytes = nr_sets * NR_WAYS * KMIG_PAGE_BYTES;
    delta->nr_sets = nr_sets;
    delta->nr_bytes = page_bytes + nr_sets * NR_WAYS * sizeof(struct kmig_kept);
    void *area = mmap(NULL, delta->nr_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) {
        pthread_mutex_destroy(&delta->lock);
        free(delta);
        return -ENOMEM;
    }
    // Copies of guest memory in a core dump help nobody and may be secret.
    madvise(area, delta->nr_bytes, MADV_DONTDUMP);
    delta->pages = area;
    delta->kept = (struct kmig_kept *)(delta->pages + page_bytes);
    *ret = delta;
    return 0;
}

void kmig_delta_destroy(struct kmig_delta *delta)
{
    if (!delta)
        return;
    munmap(delta->pages, delta->nr_bytes);
    pthread_mutex_destroy(&delta->lock);
    free(delta);
}

void kmig_delta_begin(struct kmig_delta *delta, bool first)
{
    delta->round++;
    if (!first || !delta->nr_kept)
        return;
    memset(delta->kept, 0, delta->nr_sets * NR_WAYS * sizeof(*delta->kept));
    delta->nr_kept = 0;
}

static struct kmig_kept *find(const struct kmig_delta *delta, uint64_t gfn)
{
    struct kmig_kept *set = &delta->kept[gfn % delta->nr_sets * NR_WAYS];

    for (struct kmig_kept *kept = set; kept < set + NR_WAYS; kept++)
        if (kept->gfn_1 == gfn + 1)
            return kept;
    return NULL;
}

// A free place for gfn, or that of a page that was sent neither in this round nor in the one before: when more pages are
// written again and again than there is room for, some of them stay, instead of each driving out the next.
static struct kmig_kept *make_room(struct kmig_delta *delta, uint64_t gfn)
{
    struct kmig_kept *set = &delta->kept[gfn % delta->nr_sets * NR_WAYS], *oldest = set;

    for (struct kmig_kept *kept = set; kept < set + NR_WAYS; kept++) {
        if (!kept->gfn_1) {
            delta->nr_kept++;
            return kept;
        }
        if (kept->round < oldest->round)
            oldest = kept;
    }
    return oldest->round + 1 < delta->round ? oldest : NULL;
}

void kmig_delta_drop(struct kmig_delta *delta, uint64_t gfn)
{
    pthread_mutex_lock(&delta->lock);
    struct kmig_kept *kept = delta->nr_kept ? find(delta, gfn) : NULL;
    if (kept) {
        kept->gfn_1 = 0;
        delta->nr_kept--;
    }
    pthread_mutex_unlock(&delta->lock);
}

static uint64_t count_changed(const uint64_t *now, const uint64_t *old)
{
    uint64_t changed = 0;
    for (int i = 0; i < PAGE_WORDS; i++)
        changed += now[i] != old[i];
    return changed;
}

// Leave what changed in now, and the new content in old.
static void exchange(uint64_t *now, uint64_t *old)
{
    for (int i = 0; i < PAGE_WORDS; i++) {
        uint64_t changed = now[i] ^ old[i];
        old[i] = now[i];
        now[i] = changed;
    }
}

static bool take(struct kmig_delta *delta, uint64_t gfn, uint8_t *page, uint64_t hash, uint64_t last_hash)
{
    struct kmig_kept *kept = delta->nr_kept ? find(delta, gfn) : NULL;
    // What is kept is a base only if it is what was sent last.
    bool is_base = kept && (kept->hash == last_hash || KMIG_FAULT("stale-delta-base"));

    if (!kept && !(kept = make_room(delta, gfn)))
        return false;
    uint8_t *old = delta->pages + (uint64_t)(kept - delta->kept) * KMIG_PAGE_BYTES;
    if (KMIG_FAULT("wrong-delta") && is_base)
        old[0] ^= 1;
    bool as_delta = is_base && count_changed((uint64_t *)page, (uint64_t *)old) <= MOST_CHANGED;
    if (as_delta && KMIG_FAULT("stale-delta-base")) {
        for (int i = 0; i < PAGE_WORDS; i++)
            ((uint64_t *)page)[i] ^= ((uint64_t *)old)[i];
        return true;
    }
    if (as_delta)
        exchange((uint64_t *)page, (uint64_t *)old);
    else
        memcpy(old, page, KMIG_PAGE_BYTES);
    *kept = (struct kmig_kept){gfn + 1, hash, delta->round};
    return as_delta;
}

bool kmig_delta_take(struct kmig_delta *delta, uint64_t gfn, uint8_t *page, uint64_t hash, uint64_t last_hash)
{
    pthread_mutex_lock(&delta->lock);
    bool as_delta = take(delta, gfn, page, hash, last_hash);
    pthread_mutex_unlock(&delta->lock);
    return as_delta;
}

int kmig_delta_check(const struct kmig_memory *memory, const struct kmig_page_run *run, uint32_t nr_runs,
                     const uint8_t *bases)
{
    uint64_t sum = 0, announced = 0;
    bool any = false;

    for (uint32_t i = 0; i < nr_runs; i++) {
        if (run[i].kind != KMIG_RUN_DELTA)
            continue;
        any = true;
        // Taken from the pages themselves, not from what is noted of them: they are about to be built upon.
        for (uint32_t page = 0; bases && page < run[i].nr_pages; page++)
            sum += kmig_digest_term(run[i].gfn + page, kmig_page_hash(kmig_memory_hva(memory, run[i].gfn + page)));
    }
    if (any != !!bases)
        return -EPROTO;
    if (bases)
        memcpy(&announced, bases, sizeof(announced));
    return announced == sum ? 0 : -ESTALE;
}

void kmig_delta_apply(uint8_t *page, const uint8_t *changed, size_t size_bytes)
{
    for (size_t at = 0; at < size_bytes; at += 8) {
        uint64_t word, with;
        memcpy(&word, page + at, 8);
        memcpy(&with, changed + at, 8);
        word ^= with;
        memcpy(page + at, &word, 8);
    }
}
