// A look at hostile msgpack without making anything of it.

struct kmig_plain_limits {
    uint32_t str_bytes;
    uint32_t bin_bytes;
    uint32_t items;            // of an array or a map
};

// Whether the size_bytes at data are one value and nothing else, made of nil, booleans, numbers, bin, str in ASCII, arrays
// and maps with str as keys, within the limits and not nested deeply. What is not may be good all the same: then it is for
// a decoder to say.
int kmig_is_plain(const void *data, uint64_t size_bytes, const struct kmig_plain_limits *limits);
