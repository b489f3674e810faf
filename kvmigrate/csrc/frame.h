// The header of a frame, as state/frame.py specifies it.
#ifndef KMIG_FRAME_H
#define KMIG_FRAME_H

#include <stddef.h>
#include <string.h>

#include "core.h"

#define KMIG_FLAG_MANDATORY 1

// The machine is little endian, like the wire: KVM on x86-64 is all there is.
struct kmig_frame_header {
    uint8_t magic[4];
    uint16_t kind;
    uint16_t flags;
    uint64_t length;
    uint64_t checksum;
    uint32_t sequence;
    uint32_t header_checksum;
};

_Static_assert(sizeof(struct kmig_frame_header) == 32, "the wire format");

static const uint8_t kmig_frame_magic[4] = {'K', 'V', 'M', 'G'};

static inline uint32_t kmig_frame_header_checksum(const struct kmig_frame_header *header)
{
    return (uint32_t)kmig_hash(header, offsetof(struct kmig_frame_header, header_checksum));
}

// Complete a header that has all but its magic and the checksums; the checksum covers covered_bytes of the payload.
static inline void kmig_frame_seal(struct kmig_frame_header *header, const void *payload, uint64_t covered_bytes)
{
    memcpy(header->magic, kmig_frame_magic, sizeof(header->magic));
    header->checksum = kmig_hash(payload, covered_bytes);
    header->header_checksum = kmig_frame_header_checksum(header);
}

static inline bool kmig_frame_has_magic(const struct kmig_frame_header *header)
{
    return memcmp(header->magic, kmig_frame_magic, sizeof(header->magic)) == 0;
}

#endif
