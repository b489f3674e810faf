// Structs into msgpack, as its specification has it (msgpack/msgpack, spec.md): integers in the shortest form, bin, and
// str keys. Numbers are big endian there.
#include <string.h>

#include "core.h"
#include "integer.h"

struct writer {
    uint8_t *at;
    uint8_t *end;
    int rc;
};

static void put(struct writer *out, const void *data, size_t size_bytes)
{
    if ((size_t)(out->end - out->at) < size_bytes) {
        out->rc = -ENOSPC;
        return;
    }
    memcpy(out->at, data, size_bytes);
    out->at += size_bytes;
}

// A tag and a number of size_bytes behind it.
static void put_number(struct writer *out, uint8_t tag, uint64_t value, size_t size_bytes)
{
    uint8_t bytes[9] = {tag};

    for (size_t i = 0; i < size_bytes; i++)
        bytes[1 + i] = (uint8_t)(value >> 8 * (size_bytes - 1 - i));
    put(out, bytes, 1 + size_bytes);
}

static void put_unsigned(struct writer *out, uint64_t value)
{
    if (value < 0x80)
        put_number(out, (uint8_t)value, 0, 0);
    else if (value <= UINT8_MAX)
        put_number(out, 0xcc, value, 1);
    else if (value <= UINT16_MAX)
        put_number(out, 0xcd, value, 2);
    else if (value <= UINT32_MAX)
        put_number(out, 0xce, value, 4);
    else
        put_number(out, 0xcf, value, 8);
}

static void put_signed(struct writer *out, int64_t value)
{
    if (value >= 0)
        put_unsigned(out, (uint64_t)value);
    else if (value >= -32)
        put_number(out, (uint8_t)value, 0, 0);
    else if (value >= INT8_MIN)
        put_number(out, 0xd0, (uint64_t)value, 1);
    else if (value >= INT16_MIN)
        put_number(out, 0xd1, (uint64_t)value, 2);
    else if (value >= INT32_MIN)
        put_number(out, 0xd2, (uint64_t)value, 4);
    else
        put_number(out, 0xd3, (uint64_t)value, 8);
}

// The head of a map or an array: up to 15 items in the tag itself, which is fix; otherwise behind the tag long_16 or
// the one after it.
static void put_head(struct writer *out, uint8_t fix, uint8_t long_16, uint32_t count)
{
    if (count < 16)
        put_number(out, (uint8_t)(fix | count), 0, 0);
    else if (count <= UINT16_MAX)
        put_number(out, long_16, count, 2);
    else
        put_number(out, (uint8_t)(long_16 + 1), count, 4);
}

static void put_key(struct writer *out, const struct kmig_field *field)
{
    if (field->name_bytes < 32)
        put_number(out, (uint8_t)(0xa0 | field->name_bytes), 0, 0);
    else
        put_number(out, 0xd9, field->name_bytes, 1);
    put(out, field->name, field->name_bytes);
}

static void put_bytes(struct writer *out, const void *data, uint32_t size_bytes)
{
    if (size_bytes <= UINT8_MAX)
        put_number(out, 0xc4, size_bytes, 1);
    else if (size_bytes <= UINT16_MAX)
        put_number(out, 0xc5, size_bytes, 2);
    else
        put_number(out, 0xc6, size_bytes, 4);
    put(out, data, size_bytes);
}

static void put_struct(struct writer *out, const struct kmig_layout *layout, const uint8_t *data);

static void put_item(struct writer *out, const struct kmig_field *field, const uint8_t *data, const uint8_t *at)
{
    uint32_t size = field->size_bytes;

    switch (field->kind) {
    case KMIG_FIELD_UNSIGNED:
        put_unsigned(out, kmig_load(at, size));
        break;
    case KMIG_FIELD_SIGNED:
        put_signed(out, kmig_sign_extended(kmig_load(at, size), size));
        break;
    case KMIG_FIELD_BYTES:
        put_bytes(out, at, size);
        break;
    case KMIG_FIELD_TRUTH:
        put_number(out, *at ? 0xc3 : 0xc2, 0, 0);
        break;
    case KMIG_FIELD_BLOB:
    case KMIG_FIELD_ROW:
        size = (uint32_t)kmig_load(data + field->length_at, sizeof(uint32_t));
        if (size > field->size_bytes)
            out->rc = -EINVAL;
        else
            put_bytes(out, at, size);
        break;
    default:
        put_struct(out, field->of, at);
    }
}

static void put_struct(struct writer *out, const struct kmig_layout *layout, const uint8_t *data)
{
    put_head(out, 0x80, 0xde, layout->nr_fields);
    for (uint32_t i = 0; i < layout->nr_fields && !out->rc; i++) {
        const struct kmig_field *field = &layout->field[i];
        put_key(out, field);
        if (field->is_array)
            put_head(out, 0x90, 0xdc, field->count);
        for (uint32_t n = 0; n < field->count; n++)
            put_item(out, field, data, data + field->offset + n * field->size_bytes);
    }
}

long kmig_layout_encode(const struct kmig_layout *layout, const void *data, void *out, uint64_t room_bytes)
{
    struct writer writer = {out, (uint8_t *)out + room_bytes, 0};

    put_struct(&writer, layout, data);
    return writer.rc ? writer.rc : (long)(writer.at - (uint8_t *)out);
}
