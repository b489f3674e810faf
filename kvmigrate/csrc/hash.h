// Page hashes and the running digest over them.
#ifndef KMIG_HASH_H
#define KMIG_HASH_H

#include "core.h"

bool kmig_page_is_zero(const uint8_t *page);

// XXH3-64 of a page; 0 for a zero page and for no other: a hash that happens to be 0 counts as 1.
uint64_t kmig_page_hash(const uint8_t *page);
uint64_t kmig_page_hash_avx2(const uint8_t *page);

// What a page that hashes to hash adds to the digest: nothing when it is zero, so that a page that was never touched
// needs no visit. The gfn goes in so that two pages that changed places are noticed.
static inline uint64_t kmig_digest_term(uint64_t gfn, uint64_t hash)
{
    if (!hash)
        return 0;
    uint64_t x = hash ^ (gfn + 1) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 33) * UINT64_C(0xff51afd7ed558ccd);
    x = (x ^ x >> 33) * UINT64_C(0xc4ceb9fe1a85ec53);
    return x ^ x >> 33;
}

static inline void kmig_hash_set(struct kmig_memory *memory, struct kmig_slot *slot, uint64_t page, uint64_t hash)
{
    uint64_t old = slot->hash[page];
    if (old == hash)
        return;
    uint64_t gfn = slot->base_gfn + page;
    slot->hash[page] = hash;
    // Several connections may be at it, each with pages of its own.
    __atomic_fetch_add(&memory->digest, kmig_digest_term(gfn, hash) - kmig_digest_term(gfn, old), __ATOMIC_RELAXED);
    if (!hash != !old)
        __atomic_fetch_add(&memory->nr_hashed, hash ? 1 : UINT64_MAX, __ATOMIC_RELAXED);
}

#endif
