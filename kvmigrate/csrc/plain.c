// The forms of msgpack (its specification, "formats"), looked at and passed over.
#include "core.h"

#define MAX_DEPTH 16

struct reader {
    const uint8_t *at;
    const uint8_t *end;
    const struct kmig_plain_limits *limits;
};

static bool pass(struct reader *in, uint64_t nr_bytes)
{
    if ((uint64_t)(in->end - in->at) < nr_bytes)
        return false;
    in->at += nr_bytes;
    return true;
}

// The big-endian count of 1, 2 or 4 bytes that comes next, which is at most limit.
static bool take_count(struct reader *in, unsigned size_bytes, uint32_t limit, uint32_t *ret)
{
    const uint8_t *at = in->at;

    if (!pass(in, size_bytes))
        return false;
    for (*ret = 0; at < in->at; at++)
        *ret = *ret << 8 | *at;
    return *ret <= limit;
}

static bool pass_ascii(struct reader *in, uint32_t nr_bytes)
{
    const uint8_t *at = in->at;
    uint8_t high = 0;

    if (nr_bytes > in->limits->str_bytes || !pass(in, nr_bytes))
        return false;
    while (at < in->at)
        high |= *at++;
    return high < 0x80;
}

static bool pass_str(struct reader *in)
{
    uint32_t nr_bytes;
    uint8_t tag;

    if (in->at == in->end)
        return false;
    tag = *in->at++;
    if ((tag & 0xe0) == 0xa0)
        return pass_ascii(in, tag & 0x1f);
    return tag >= 0xd9 && tag <= 0xdb && take_count(in, 1u << (tag - 0xd9), in->limits->str_bytes, &nr_bytes) &&
           pass_ascii(in, nr_bytes);
}

static bool pass_value(struct reader *in, unsigned depth);

static bool pass_items(struct reader *in, uint32_t nr_items, bool is_map, unsigned depth)
{
    if (depth == MAX_DEPTH || nr_items > in->limits->items)
        return false;
    while (nr_items--)
        if ((is_map && !pass_str(in)) || !pass_value(in, depth + 1))
            return false;
    return true;
}

static bool pass_long(struct reader *in, uint8_t tag, unsigned depth)
{
    uint32_t count;

    switch (tag) {
    case 0xc0: case 0xc2: case 0xc3:
        return true;
    case 0xc4: case 0xc5: case 0xc6:
        return take_count(in, 1u << (tag - 0xc4), in->limits->bin_bytes, &count) && pass(in, count);
    case 0xca: case 0xcb:
        return pass(in, 4u << (tag - 0xca));
    case 0xcc: case 0xcd: case 0xce: case 0xcf:
        return pass(in, 1u << (tag - 0xcc));
    case 0xd0: case 0xd1: case 0xd2: case 0xd3:
        return pass(in, 1u << (tag - 0xd0));
    case 0xdc: case 0xdd: case 0xde: case 0xdf:
        return take_count(in, tag & 1 ? 4 : 2, in->limits->items, &count) && pass_items(in, count, tag >= 0xde, depth);
    default:
        in->at--;
        return pass_str(in);
    }
}

static bool pass_value(struct reader *in, unsigned depth)
{
    uint8_t tag;

    if (in->at == in->end)
        return false;
    tag = *in->at++;
    if (tag < 0x80 || tag >= 0xe0)
        return true;
    if (tag < 0xa0)
        return pass_items(in, tag & 0x0f, tag < 0x90, depth);
    return pass_long(in, tag, depth);
}

int kmig_is_plain(const void *data, uint64_t size_bytes, const struct kmig_plain_limits *limits)
{
    struct reader in = { data, (const uint8_t *)data + size_bytes, limits };

    return pass_value(&in, 0) && in.at == in.end;
}
