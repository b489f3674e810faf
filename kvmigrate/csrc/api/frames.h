// Whole frames in memory, several in one call: those of the blackout.

struct kmig_frame {
    uint32_t kind;
    uint32_t flags;
    uint64_t at;               // where its payload begins
    uint64_t length;           // and how long it is
};

// Write the headers of nr_frames that lie in a row at data, each with room for its header before its payload, numbered
// from sequence on. Where the payloads begin is found out.
void kmig_frames_seal(void *data, struct kmig_frame *frames, uint32_t nr_frames, uint32_t sequence);

// Whether the size_bytes at data are nr_frames of one kind and nothing else, undamaged, numbered from sequence on, and
// their payloads plain (see plain.h); what they are is in frames then. What is not may be good all the same.
int kmig_frames_split(const void *data, uint64_t size_bytes, uint32_t kind, uint32_t sequence,
                      const struct kmig_plain_limits *limits, struct kmig_frame *frames, uint32_t nr_frames);
