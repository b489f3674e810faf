// Integers of any size in memory. The machine is little endian: KVM on x86-64 is all there is.
#ifndef KMIG_INTEGER_H
#define KMIG_INTEGER_H

#include <stdint.h>
#include <string.h>

// The unsigned integer of size_bytes, 1 to 8, at a place of any alignment.
static inline uint64_t kmig_load(const uint8_t *at, uint32_t size_bytes)
{
    uint64_t value = 0;

    memcpy(&value, at, size_bytes);
    return value;
}

// The low size_bytes of value as a signed integer.
static inline int64_t kmig_sign_extended(uint64_t value, uint32_t size_bytes)
{
    uint32_t unused = 64 - 8 * size_bytes;

    return (int64_t)(value << unused) >> unused;
}

#endif
