// From pending pages to chunks: clear the log, drop zeros, hash, coalesce. What stream.c and file.c have in common.

#define KMIG_CHUNK_PAGES 256
#define KMIG_RUN_DATA 0
#define KMIG_RUN_ZERO 1
#define KMIG_RUN_DELTA 2

// One row of a page table: nr_pages pages from gfn on. The layout is part of the wire format.
struct kmig_page_run {
    uint64_t gfn;
    uint32_t nr_pages;
    uint32_t kind;
};

// One round, or the part in it of one of several connections, each in a thread of its own. The first group is set by the
// caller; the counters may be read by another thread while the round runs.
struct kmig_round {
    int abort_fd;              // an eventfd: readable means stop with -ECANCELED; -1 for none
    int first;                 // 1 for the first round: take what is resident, window by window
    uint64_t bandwidth;        // bytes per second, 0 for no cap
    int64_t timeout_ms;        // how long a peer may take nothing before -ETIMEDOUT
    struct kmig_delta *delta;  // pages as last sent, or NULL: then every page goes whole
    struct kmig_zerocopy *zerocopy;    // of the connection, if its pages go by MSG_ZEROCOPY, or NULL
    struct kmig_splice *splice;        // of the connection, if its pages go through a pipe, or NULL

    uint64_t pages_total;      // pending when the round began (in the first round: grows as windows are looked up)
    uint64_t pages_done;       // looked at
    uint64_t pages_zero;       // zero, and not sent
    uint64_t pages_sent;       // sent as data
    uint64_t pages_delta;      // of these, as what changed in them
    uint64_t pages_cleared;    // announced as zero because the other side holds something else
    uint64_t bytes_sent;       // everything that left, headers included
    uint64_t busy_ns;          // spent in the socket or file

    uint32_t slot;             // the piece that was taken last, and where it has come to in that
    uint32_t ended;            // 1: there is no more to take, or it failed
    uint64_t page;
    uint64_t piece_end;
    uint64_t next_send_ns;     // the pacer's clock
};

// Up to KMIG_CHUNK_PAGES pages that are ready to be copied.
struct kmig_chunk {
    uint32_t nr_runs;
    uint32_t nr_data_pages;    // those of delta runs too
    uint32_t nr_delta_pages;
    uint32_t reserved;
    uint64_t bases;            // of delta runs: the sum of the digest terms of the pages as they were sent before
    struct kmig_page_run run[KMIG_CHUNK_PAGES];
    uint8_t *hva[KMIG_CHUNK_PAGES];
};

// Begin a round over what is pending. With round->first: over what is resident, after all hashes are forgotten, since the
// other side holds nothing yet.
void kmig_round_begin(struct kmig_memory *memory, struct kmig_round *round);

// Let one more connection take its part of the round that kmig_round_begin began, before any of them takes a chunk. round
// is set up as that of the first one. The round is over when kmig_round_next has returned 0 for each.
void kmig_round_join(struct kmig_memory *memory, struct kmig_round *round);

// The next chunk: clear its pages in the log, then look at them, hash them and take them off pending. When bounce is
// not NULL (KMIG_CHUNK_PAGES pages) the data pages are copied there first and hashed there, for a compressor that must
// not see them change; with round->delta, pages of delta runs lie there as what changed. Returns 1 with a chunk, 0 when the round is done, -ECANCELED, or -errno of the log; on an error
// every page is pending that was not handed out before.
int kmig_round_next(struct kmig_memory *memory, struct kmig_round *round, struct kmig_chunk *chunk, uint8_t *bounce);

// Hold back a send of size_bytes until the cap of round allows it; -ECANCELED when aborted meanwhile.
int kmig_round_pace(struct kmig_round *round, uint64_t size_bytes);

// Copy up to nr_pages of the pages that are still pending, and not zero, to data: pieces of up to 16 pages, spread over
// all of them. For a look at what is to come; nothing is taken off pending. Returns how many pages.
long kmig_memory_sample(struct kmig_memory *memory, uint8_t *data, uint64_t nr_pages);

// Put the pages of a chunk back to pending: it was not delivered.
void kmig_round_put_back(struct kmig_memory *memory, struct kmig_round *round, const struct kmig_chunk *chunk);

// Check a page table against memory: every run inside one slot and of a kind up to last_kind, gfns rising so that no page
// comes twice, at most KMIG_CHUNK_PAGES pages in all. Returns the number of data pages, or -EINVAL.
long kmig_table_check(const struct kmig_memory *memory, const struct kmig_page_run *run, uint32_t nr_runs, uint32_t last_kind);

// Write pages that were received as a whole (nr_data_pages × 4096 bytes) to where a checked table says; update hashes.
int kmig_table_apply(struct kmig_memory *memory, const struct kmig_page_run *run, uint32_t nr_runs, const uint8_t *data);
