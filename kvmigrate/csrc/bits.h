// Bitmaps of pages: bit n of the words is page n of a slot. Bits past the slot's last page are always 0.
#ifndef KMIG_BITS_H
#define KMIG_BITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline size_t kmig_bits_words(uint64_t nr_bits)
{
    return (size_t)((nr_bits + 63) / 64);
}

static inline bool kmig_bits_test(const uint64_t *map, uint64_t bit)
{
    return map[bit / 64] >> (bit % 64) & 1;
}

static inline void kmig_bits_set(uint64_t *map, uint64_t bit)
{
    map[bit / 64] |= UINT64_C(1) << (bit % 64);
}

static inline void kmig_bits_unset(uint64_t *map, uint64_t bit)
{
    map[bit / 64] &= ~(UINT64_C(1) << (bit % 64));
}

// The bits of word number word that lie in first..end.
static inline uint64_t kmig_bits_mask(uint64_t word, uint64_t first, uint64_t end)
{
    uint64_t mask = ~UINT64_C(0);
    if (word == first / 64)
        mask &= ~UINT64_C(0) << (first % 64);
    if (word == end / 64)
        mask &= ~(~UINT64_C(0) << (end % 64));
    return mask;
}

static inline void kmig_bits_set_range(uint64_t *map, uint64_t first, uint64_t end)
{
    for (uint64_t word = first / 64; word < kmig_bits_words(end); word++)
        map[word] |= kmig_bits_mask(word, first, end);
}

// The same, seen by other threads bit by bit.
static inline void kmig_bits_set_range_atomic(uint64_t *map, uint64_t first, uint64_t end)
{
    for (uint64_t word = first / 64; word < kmig_bits_words(end); word++)
        __atomic_fetch_or(&map[word], kmig_bits_mask(word, first, end), __ATOMIC_RELEASE);
}

static inline uint64_t kmig_bits_count(const uint64_t *map, uint64_t first, uint64_t end)
{
    uint64_t count = 0;
    for (uint64_t word = first / 64; word < kmig_bits_words(end); word++)
        count += (uint64_t)__builtin_popcountll(map[word] & kmig_bits_mask(word, first, end));
    return count;
}

// The first set bit in from..end, or end.
static inline uint64_t kmig_bits_next(const uint64_t *map, uint64_t from, uint64_t end)
{
    for (uint64_t word = from / 64; word < kmig_bits_words(end); word++) {
        uint64_t left = map[word] & kmig_bits_mask(word, from, end);
        if (left)
            return word * 64 + (uint64_t)__builtin_ctzll(left);
    }
    return end;
}

// The first bit in from..end that is not set, or end.
static inline uint64_t kmig_bits_next_unset(const uint64_t *map, uint64_t from, uint64_t end)
{
    for (uint64_t word = from / 64; word < kmig_bits_words(end); word++) {
        uint64_t left = ~map[word] & kmig_bits_mask(word, from, end);
        if (left)
            return word * 64 + (uint64_t)__builtin_ctzll(left);
    }
    return end;
}

#endif
