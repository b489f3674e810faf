// Whole frames in memory: their headers written and read.
#include "frame.h"

void kmig_frames_seal(void *data, struct kmig_frame *frames, uint32_t nr_frames, uint32_t sequence)
{
    uint8_t *begin = data, *at = begin;

    for (uint32_t i = 0; i < nr_frames; i++) {
        struct kmig_frame *frame = frames + i;
        struct kmig_frame_header header = {.kind = (uint16_t)frame->kind,
                                           .flags = (uint16_t)frame->flags,
                                           .length = frame->length,
                                           .sequence = sequence + i};

        frame->at = (uint64_t)(at - begin) + sizeof(header);
        kmig_frame_seal(&header, begin + frame->at, frame->length);
        memcpy(at, &header, sizeof(header));
        at += sizeof(header) + frame->length;
    }
}

int kmig_frames_split(const void *data, uint64_t size_bytes, uint32_t kind, uint32_t sequence,
                      const struct kmig_plain_limits *limits, struct kmig_frame *frames, uint32_t nr_frames)
{
    const uint8_t *begin = data;
    uint64_t at = 0;

    for (uint32_t i = 0; i < nr_frames; i++) {
        struct kmig_frame_header header;

        if (size_bytes - at < sizeof(header))
            return 0;
        memcpy(&header, begin + at, sizeof(header));
        at += sizeof(header);
        if (!kmig_frame_has_magic(&header) || header.header_checksum != kmig_frame_header_checksum(&header) ||
            header.kind != kind || header.sequence != sequence + i || header.length > size_bytes - at)
            return 0;
        if (header.checksum != kmig_hash(begin + at, header.length) || !kmig_is_plain(begin + at, header.length, limits))
            return 0;
        frames[i] = (struct kmig_frame){header.kind, header.flags, at, header.length};
        at += header.length;
    }
    return at == size_bytes;
}
