// The two things that look at every byte of a page.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "hash.h"

__attribute__((target_clones("avx2", "default")))
static uint64_t or_block(const uint64_t *words)
{
    uint64_t sum = 0;
    for (int i = 0; i < 32; i++)
        sum |= words[i];
    return sum;
}

// Most pages that are not zero show it in their first bytes: look there before entering the wide loop.
bool kmig_page_is_zero(const uint8_t *page)
{
    const uint64_t *words = (const uint64_t *)page;
    if (words[0] | words[511])
        return false;
    for (int i = 0; i < 512; i += 32)
        if (or_block(words + i))
            return false;
    return true;
}

uint64_t kmig_page_hash(const uint8_t *page)
{
    if (kmig_page_is_zero(page))
        return 0;
    uint64_t hash = XXH3_64bits(page, KMIG_PAGE_BYTES);
    return hash ? hash : 1;
}

uint64_t kmig_hash(const void *data, size_t size_bytes)
{
    return XXH3_64bits(data, size_bytes);
}
