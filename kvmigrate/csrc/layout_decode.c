// Structs out of msgpack, which is hostile. All of its forms of an integer, a str and a bin are taken, not only the
// shortest.
#include <stdio.h>
#include <string.h>

#include "core.h"
#include "integer.h"

struct reader {
    const uint8_t *at;
    const uint8_t *end;
};

// Which field of which struct is being read, for the error.
struct place {
    const struct place *outer;
    const char *name;
    uint32_t name_bytes;
    int64_t item; // of an array, or -1
};

// The big-endian number of size_bytes that comes next; false when so much is not left.
static bool take_number(struct reader *in, size_t size_bytes, uint64_t *ret)
{
    if ((size_t)(in->end - in->at) < size_bytes)
        return false;
    *ret = 0;
    while (size_bytes--)
        *ret = *ret << 8 | *in->at++;
    return true;
}

static bool take_tag(struct reader *in, uint8_t *ret)
{
    uint64_t tag;

    if (!take_number(in, 1, &tag))
        return false;
    *ret = (uint8_t)tag;
    return true;
}

// The count of a map or an array; tags as for put_head.
static uint32_t take_head(struct reader *in, uint8_t fix, uint8_t long_16, uint64_t *ret)
{
    uint8_t tag;

    if (!take_tag(in, &tag))
        return KMIG_MAP_BROKEN;
    if ((tag & 0xf0) == fix) {
        *ret = tag & 0x0f;
        return KMIG_MAP_OK;
    }
    if (tag != long_16 && tag != long_16 + 1)
        return KMIG_MAP_TYPE;
    return take_number(in, tag == long_16 ? 2 : 4, ret) ? KMIG_MAP_OK : KMIG_MAP_BROKEN;
}

// The bytes of a str or a bin, whose tags for 8, 16 and 32 bits of length follow each other from long_8 on.
static uint32_t take_bytes(struct reader *in, uint8_t tag, uint8_t long_8, const uint8_t **ret, uint64_t *ret_bytes)
{
    if (tag < long_8 || tag > long_8 + 2)
        return KMIG_MAP_TYPE;
    if (!take_number(in, (size_t)1 << (tag - long_8), ret_bytes) || (uint64_t)(in->end - in->at) < *ret_bytes)
        return KMIG_MAP_BROKEN;
    *ret = in->at;
    in->at += *ret_bytes;
    return KMIG_MAP_OK;
}

static uint32_t take_key(struct reader *in, const uint8_t **ret, uint64_t *ret_bytes)
{
    uint8_t tag;

    if (!take_tag(in, &tag))
        return KMIG_MAP_BROKEN;
    if ((tag & 0xe0) != 0xa0)
        return take_bytes(in, tag, 0xd9, ret, ret_bytes);
    *ret_bytes = tag & 0x1f;
    if ((uint64_t)(in->end - in->at) < *ret_bytes)
        return KMIG_MAP_BROKEN;
    *ret = in->at;
    in->at += *ret_bytes;
    return KMIG_MAP_OK;
}

// An integer as the low 64 bits of its two's complement, and whether it is below zero.
static uint32_t take_integer(struct reader *in, uint64_t *ret, bool *ret_negative)
{
    uint8_t tag;

    if (!take_tag(in, &tag))
        return KMIG_MAP_BROKEN;
    *ret_negative = false;
    if (tag < 0x80) {
        *ret = tag;
    } else if (tag >= 0xe0) {
        *ret = (uint64_t)(int64_t)(int8_t)tag;
        *ret_negative = true;
    } else if (tag >= 0xcc && tag <= 0xd3) {
        uint32_t size = 1u << (tag - (tag < 0xd0 ? 0xcc : 0xd0));
        if (!take_number(in, size, ret))
            return KMIG_MAP_BROKEN;
        if (tag >= 0xd0) {
            *ret = (uint64_t)kmig_sign_extended(*ret, size);
            *ret_negative = *ret >> 63;
        }
    } else {
        return KMIG_MAP_TYPE;
    }
    return KMIG_MAP_OK;
}

static uint32_t store_integer(struct reader *in, const struct kmig_field *field, uint8_t *at)
{
    uint32_t size = field->size_bytes, unused = 64 - 8 * size;
    uint64_t value;
    bool negative, fits;
    uint32_t rc = take_integer(in, &value, &negative);

    if (rc)
        return rc;
    if (field->kind == KMIG_FIELD_UNSIGNED)
        fits = !negative && value << unused >> unused == value;
    else
        fits = (negative || !(value >> 63)) && (uint64_t)kmig_sign_extended(value, size) == value;
    if (!fits)
        return KMIG_MAP_RANGE;
    memcpy(at, &value, size);
    return KMIG_MAP_OK;
}

static uint32_t store_truth(struct reader *in, uint8_t *at)
{
    uint8_t tag;

    if (!take_tag(in, &tag))
        return KMIG_MAP_BROKEN;
    if (tag != 0xc2 && tag != 0xc3)
        return KMIG_MAP_TYPE;
    *at = tag == 0xc3;
    return KMIG_MAP_OK;
}

static uint32_t store_bytes(struct reader *in, const struct kmig_field *field, uint8_t *data, uint8_t *at)
{
    const uint8_t *bytes;
    uint64_t nr_bytes;
    uint8_t tag;

    if (!take_tag(in, &tag))
        return KMIG_MAP_BROKEN;
    uint32_t rc = take_bytes(in, tag, 0xc4, &bytes, &nr_bytes);
    if (rc)
        return rc;
    if (nr_bytes > field->size_bytes || (field->kind == KMIG_FIELD_BYTES && nr_bytes < field->size_bytes))
        return KMIG_MAP_LENGTH;
    memcpy(at, bytes, nr_bytes);
    if (field->kind == KMIG_FIELD_ROW)
        memcpy(data + field->length_at, &(uint32_t){(uint32_t)nr_bytes}, sizeof(uint32_t));
    // The length may be one of the bytes' own: then it has to be theirs.
    if (field->kind == KMIG_FIELD_BLOB && kmig_load(data + field->length_at, sizeof(uint32_t)) != nr_bytes)
        return KMIG_MAP_LENGTH;
    return KMIG_MAP_OK;
}

static void append(char *text, size_t room, const char *more, size_t nr_bytes)
{
    size_t length = strlen(text);
    size_t most = room - 1 - length;

    nr_bytes = nr_bytes < most ? nr_bytes : most;
    memcpy(text + length, more, nr_bytes);
    text[length + nr_bytes] = '\0';
}

static void append_place(struct kmig_map_error *error, const struct place *place)
{
    char item[24];

    if (!place)
        return;
    append_place(error, place->outer);
    append(error->where, sizeof(error->where), ".", 1);
    append(error->where, sizeof(error->where), place->name, place->name_bytes);
    if (place->item >= 0)
        append(error->where, sizeof(error->where), item, (size_t)snprintf(item, sizeof(item), "[%lld]", (long long)place->item));
}

static int fail(struct kmig_map_error *error, uint32_t what, const struct place *place)
{
    error->what = what;
    error->where[0] = '\0';
    append_place(error, place);
    return -EINVAL;
}

static int take_struct(struct reader *in, const struct kmig_layout *layout, uint8_t *data, const struct place *outer,
                       struct kmig_map_error *error);

static int take_item(struct reader *in, const struct kmig_field *field, uint8_t *data, uint8_t *at,
                     const struct place *place, struct kmig_map_error *error)
{
    uint32_t rc;

    switch (field->kind) {
    case KMIG_FIELD_STRUCT:
        return take_struct(in, field->of, at, place, error);
    case KMIG_FIELD_TRUTH:
        rc = store_truth(in, at);
        break;
    case KMIG_FIELD_BYTES:
    case KMIG_FIELD_BLOB:
    case KMIG_FIELD_ROW:
        rc = store_bytes(in, field, data, at);
        break;
    default:
        rc = store_integer(in, field, at);
    }
    return rc ? fail(error, rc, place) : 0;
}

static int take_field(struct reader *in, const struct kmig_field *field, uint8_t *data, const struct place *outer,
                      struct kmig_map_error *error)
{
    struct place place = {outer, field->name, field->name_bytes, -1};
    uint8_t *at = data + field->offset;
    uint64_t count;

    if (!field->is_array)
        return take_item(in, field, data, at, &place, error);
    uint32_t rc = take_head(in, 0x90, 0xdc, &count);
    if (!rc && count != field->count)
        rc = KMIG_MAP_LENGTH;
    if (rc)
        return fail(error, rc, &place);
    for (uint32_t n = 0; n < field->count; n++) {
        place.item = n;
        if (take_item(in, field, data, at + n * field->size_bytes, &place, error))
            return -EINVAL;
    }
    return 0;
}

// The field of that name, looked for from the one that is due when the order is that of the layout.
static const struct kmig_field *find(const struct kmig_layout *layout, uint32_t due, const uint8_t *key, uint64_t key_bytes)
{
    for (uint32_t i = 0; i < layout->nr_fields; i++) {
        const struct kmig_field *field = &layout->field[(due + i) % layout->nr_fields];
        if (field->name_bytes == key_bytes && memcmp(field->name, key, key_bytes) == 0)
            return field;
    }
    return NULL;
}

static int fail_by_key(struct kmig_map_error *error, uint32_t what, const struct place *outer, const void *key,
                       uint64_t key_bytes)
{
    const struct place place = {outer, key, key_bytes < 40 ? (uint32_t)key_bytes : 40, -1};

    return fail(error, what, &place);
}

static int fail_by_missing(struct kmig_map_error *error, const struct kmig_layout *layout, const uint8_t *seen,
                           const struct place *outer)
{
    uint32_t i = 0;

    while (seen[i])
        i++;
    return fail_by_key(error, KMIG_MAP_MISSING, outer, layout->field[i].name, layout->field[i].name_bytes);
}

static int take_struct(struct reader *in, const struct kmig_layout *layout, uint8_t *data, const struct place *outer,
                       struct kmig_map_error *error)
{
    uint8_t seen[KMIG_MAX_FIELDS];
    uint64_t count;
    uint32_t rc = take_head(in, 0x80, 0xde, &count), nr_seen = 0;

    if (!rc && layout->nr_fields > KMIG_MAX_FIELDS)
        rc = KMIG_MAP_LENGTH;
    if (rc)
        return fail(error, rc, outer);
    memset(seen, 0, layout->nr_fields);
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *key;
        uint64_t key_bytes;
        rc = take_key(in, &key, &key_bytes);
        if (rc)
            return fail_by_key(error, rc == KMIG_MAP_TYPE ? KMIG_MAP_UNKNOWN : rc, outer, "", 0);
        const struct kmig_field *field = find(layout, nr_seen, key, key_bytes);
        // A key that comes twice leaves another one out.
        if (!field || seen[field - layout->field])
            return fail_by_key(error, KMIG_MAP_UNKNOWN, outer, key, key_bytes);
        if (take_field(in, field, data, outer, error))
            return -EINVAL;
        seen[field - layout->field] = 1;
        nr_seen++;
    }
    return nr_seen < layout->nr_fields ? fail_by_missing(error, layout, seen, outer) : 0;
}

int kmig_layout_decode(const struct kmig_layout *layout, const void *in, uint64_t size_bytes, void *data,
                       struct kmig_map_error *error)
{
    struct reader reader = {in, (const uint8_t *)in + size_bytes};

    error->what = KMIG_MAP_OK;
    if (take_struct(&reader, layout, data, NULL, error))
        return -EINVAL;
    return reader.at == reader.end ? 0 : fail(error, KMIG_MAP_BROKEN, NULL);
}
