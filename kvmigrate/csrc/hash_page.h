// The body of a page hash, compiled once for each instruction set: NAME is the function's name, and the file that includes
// this has chosen the target before it included <xxhash.h>.

// The compiler splits it into registers of the target. Not aligned: a bounce buffer need not be.
typedef uint64_t block __attribute__((vector_size(64), aligned(1), may_alias));

static bool page_is_zero(const uint8_t *page)
{
    const block *at = (const block *)page;

    for (int i = 0; i < KMIG_PAGE_BYTES / (int)sizeof(*at); i += 4) {
        block sum = at[i] | at[i + 1] | at[i + 2] | at[i + 3];
        if (sum[0] | sum[1] | sum[2] | sum[3] | sum[4] | sum[5] | sum[6] | sum[7])
            return false;
    }
    return true;
}

uint64_t NAME(const uint8_t *page)
{
    uint64_t first, last;

    memcpy(&first, page, sizeof(first));
    memcpy(&last, page + KMIG_PAGE_BYTES - sizeof(last), sizeof(last));
    // Most pages that are not zero show it in their first or last word.
    if (!first && !last && page_is_zero(page))
        return 0;
    uint64_t hash = XXH3_64bits(page, KMIG_PAGE_BYTES);
    return hash ? hash : 1;
}
