// Rounds over a socket, and pages off a socket straight into guest memory. Frames are described in state/frame.py.

// The next part of a round that has begun, as PAGES frames numbered from *sequence on: ends after the frame with which
// most_pages were looked at or most_ns have passed. The socket may be blocking or not. Returns 1 when there may be more,
// 0 when the round is over.
int kmig_stream_send_some(struct kmig_memory *memory, struct kmig_round *round, int fd, uint32_t *sequence,
                          uint64_t most_pages, uint64_t most_ns);

// Send a copy of exactly size_bytes; returns 0, -ETIMEDOUT, -ECANCELED, -EPIPE …. abort_fd and timeout as in struct
// kmig_round; zerocopy is that of fd if pages go by reference there, else NULL.
int kmig_stream_send(int fd, const void *data, uint64_t size_bytes, int abort_fd, int64_t timeout_ms,
                     struct kmig_zerocopy *zerocopy);

// Receive exactly size_bytes, all of it within timeout_ms; -ECONNRESET when the peer closes before. For spin_us the
// caller's processor looks again and again before it sleeps; zerocopy as above.
int kmig_stream_recv(int fd, void *data, uint64_t size_bytes, int abort_fd, int64_t timeout_ms, uint64_t spin_us,
                     struct kmig_zerocopy *zerocopy);

enum { KMIG_SMALL_PAYLOAD_BYTES = 4096 };

struct kmig_incoming {
    int abort_fd;
    uint32_t spin_us;          // for the first frame, as kmig_stream_recv has it
    int64_t timeout_ms;
    uint32_t sequence;         // of the next frame
    uint32_t kind;             // of the frame whose header came last
    uint32_t flags;
    uint32_t frame_flags;      // of a PAGES frame: bit 0 is zstd, bit 1 that there are delta runs
    uint64_t length;
    uint64_t checksum;
    uint64_t bytes_received;
    uint64_t pages_received;
    uint64_t pages_cleared;
    uint32_t has_payload;      // whether payload holds all of that frame's
    uint8_t payload[KMIG_SMALL_PAYLOAD_BYTES];
    uint32_t nr_runs;          // of a PAGES frame with flags: its table
    uint32_t nr_data_pages;
    struct kmig_page_run run[KMIG_CHUNK_PAGES];
};

// Receive one frame, within timeout_ms as a whole. Returns 1 with its header; its payload, which nobody has checked, is
// read if it is small, but never that of a PAGES frame. Returns 0 when the header is damaged or not the one that is due:
// then payload begins with it, for who can tell what is wrong. zerocopy as above.
int kmig_stream_recv_frame(struct kmig_incoming *in, int fd, struct kmig_zerocopy *zerocopy);

// Receive frames: every PAGES frame without flags goes straight into memory (bounds and table checksum checked first).
// Returns 1 with the first frame that is anything else, read as far as kmig_stream_recv_frame does; of a PAGES frame with
// flags the table is read and checked, and its data (length in in->length) is still unread.
// -ESTALE: a delta run builds upon other pages than are here.
// -EBADMSG: a header or table is damaged; -EPROTO: a wrong magic, sequence or length; -EINVAL: a table that cannot be.
int kmig_stream_recv_pages(struct kmig_memory *memory, struct kmig_incoming *in, int fd);
