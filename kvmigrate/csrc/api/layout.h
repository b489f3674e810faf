// Structs of the kernel as msgpack maps under the kernel's own field names, and back.

enum {
    KMIG_FIELD_UNSIGNED,
    KMIG_FIELD_SIGNED,
    KMIG_FIELD_BYTES,          // size_bytes of them, always
    KMIG_FIELD_BLOB,           // up to size_bytes: as many as the __u32 at length_at says
    KMIG_FIELD_STRUCT,
    KMIG_FIELD_TRUTH,          // one byte, 0 or 1: a boolean
    KMIG_FIELD_ROW,            // as a blob, but the __u32 lies apart from the bytes and is written with them
};

struct kmig_field {
    const char *name;          // without a zero at its end
    const struct kmig_layout *of; // of a KMIG_FIELD_STRUCT
    uint32_t kind;
    uint32_t offset;           // of it, and of the length of a blob or row, from the struct's begin
    uint32_t length_at;
    uint32_t size_bytes;       // of one item
    uint32_t count;            // how many items: 1 unless it is an array
    uint32_t is_array;
    uint32_t name_bytes;
};

struct kmig_layout {
    const struct kmig_field *field; // in the order in which they are written
    uint32_t nr_fields;        // more than KMIG_MAX_FIELDS are not taken out of a map
    uint32_t size_bytes;
};

#define KMIG_MAX_FIELDS 1024

enum {
    KMIG_MAP_OK,
    KMIG_MAP_BROKEN,           // not msgpack, or more than one value
    KMIG_MAP_MISSING,
    KMIG_MAP_UNKNOWN,
    KMIG_MAP_TYPE,
    KMIG_MAP_RANGE,
    KMIG_MAP_LENGTH,
};

#define KMIG_WHERE_BYTES 160

struct kmig_map_error {
    uint32_t what;
    char where[160];           // ".cs.base"; a key that is no field's, shortened, where one is unknown
};

// data as a map in out. Returns its size in bytes, -ENOSPC when room_bytes are too few, -EINVAL for a blob or
// row that is longer than it can be.
long kmig_layout_encode(const struct kmig_layout *layout, const void *data, void *out, uint64_t room_bytes);

// The map at in, which is hostile, as a struct at data: exactly the layout's keys, in any order, each with a value of
// its type, range and length. What lies between the fields is left as it is. Returns 0, or -EINVAL with what is wrong in
// error; data has been written to in part then.
int kmig_layout_decode(const struct kmig_layout *layout, const void *in, uint64_t size_bytes, void *data,
                       struct kmig_map_error *error);
