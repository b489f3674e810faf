// Hashes for every x86-64, and the choice of the page hash at run time.
#define XXH_INLINE_ALL
#include <string.h>
#include <xxhash.h>

#include "hash.h"

#define NAME page_hash_sse2
static uint64_t NAME(const uint8_t *page);
#include "hash_page.h"

uint64_t kmig_page_hash(const uint8_t *page)
{
    return __builtin_cpu_supports("avx2") ? kmig_page_hash_avx2(page) : page_hash_sse2(page);
}

bool kmig_page_is_zero(const uint8_t *page)
{
    return page_is_zero(page);
}

uint64_t kmig_hash(const void *data, size_t size_bytes)
{
    return XXH3_64bits(data, size_bytes);
}
