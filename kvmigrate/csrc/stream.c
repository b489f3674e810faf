// PAGES frames over a socket. The layout of a frame is specified in state/frame.py.
#include <limits.h>
#include <string.h>
#include <sys/socket.h>

#include "frame.h"
#include "internal.h"
#include "link.h"

#define FRAME_PAGES 3
#define PAGES_ZSTD 1
#define PAGES_DELTA 2
// A zstd frame of pages that do not shrink is this much larger than they are (ZSTD_compressBound, rounded up).
#define ZSTD_SLACK_BYTES (KMIG_CHUNK_PAGES * KMIG_PAGE_BYTES / 256 + 512)

struct pages_head {
    uint32_t nr_runs;
    uint32_t flags;
    uint64_t data_bytes;
};

_Static_assert(sizeof(struct pages_head) == 16, "the wire format");
_Static_assert(sizeof(struct kmig_page_run) == 16, "the wire format");
_Static_assert(KMIG_CHUNK_PAGES + 2 <= IOV_MAX, "a chunk is one sendmsg");

// The head of a PAGES frame as one piece, so that one checksum goes over head and table.
struct pages_table {
    struct pages_head head;
    struct kmig_page_run run[KMIG_CHUNK_PAGES];
    uint64_t room_for_bases;
};

static size_t table_bytes(uint32_t nr_runs)
{
    return sizeof(struct pages_head) + nr_runs * sizeof(struct kmig_page_run);
}

// The data runs of a page table as a list of pieces. Returns how many.
static size_t runs_to_iov(const struct kmig_chunk *chunk, struct iovec *iov)
{
    size_t nr = 0;

    for (uint32_t i = 0; i < chunk->nr_runs; i++) {
        if (chunk->run[i].kind != KMIG_RUN_DATA)
            continue;
        iov[nr++] = (struct iovec){chunk->hva[i], (size_t)chunk->run[i].nr_pages * KMIG_PAGE_BYTES};
    }
    if (KMIG_FAULT("swap-two-pages") && nr > 1 && iov[0].iov_len == iov[1].iov_len) {
        void *first = iov[0].iov_base;
        iov[0].iov_base = iov[1].iov_base;
        iov[1].iov_base = first;
    } else if (KMIG_FAULT("swap-two-pages") && nr == 1 && iov[0].iov_len >= 2 * KMIG_PAGE_BYTES) {
        uint8_t *first = iov[0].iov_base;
        iov[2] = (struct iovec){first + 2 * KMIG_PAGE_BYTES, iov[0].iov_len - 2 * KMIG_PAGE_BYTES};
        iov[1] = (struct iovec){first, KMIG_PAGE_BYTES};
        iov[0] = (struct iovec){first + KMIG_PAGE_BYTES, KMIG_PAGE_BYTES};
        nr = 3;
    }
    return nr;
}

// The head of a frame goes as a copy: it is made anew for the next one while this one may still be under way. So do few
// pages, which are sooner copied than accounted for.
static int send_pieces(const struct kmig_link *link, struct iovec *iov, size_t nr_head, size_t nr_data, bool by_reference)
{
    if (!by_reference)
        return kmig_link_send(link, iov, nr_head + nr_data, 0);
    int rc = kmig_link_send(link, iov, nr_head, MSG_MORE);
    return rc ? rc : kmig_link_send(link, iov + nr_head, nr_data, MSG_ZEROCOPY);
}

static int send_chunk(struct kmig_round *round, const struct kmig_link *link, const struct kmig_chunk *chunk,
                      uint32_t sequence)
{
    uint64_t data_bytes = (uint64_t)chunk->nr_data_pages * KMIG_PAGE_BYTES;
    struct pages_table table = {.head = {chunk->nr_runs, 0, data_bytes}};
    size_t head_bytes = table_bytes(chunk->nr_runs);
    struct kmig_frame_header header = {
        .kind = FRAME_PAGES, .flags = KMIG_FLAG_MANDATORY, .length = head_bytes + data_bytes, .sequence = sequence};
    struct iovec iov[KMIG_CHUNK_PAGES + 2] = {{&header, sizeof(header)}, {&table, head_bytes}};

    memcpy(table.run, chunk->run, chunk->nr_runs * sizeof(*chunk->run));
    kmig_frame_seal(&header, &table, head_bytes);
    int rc = kmig_round_pace(round, sizeof(header) + header.length);
    if (rc)
        return rc;
    uint64_t began_ns = kmig_now_ns();
    bool by_reference = (link->zerocopy || link->splice) && chunk->nr_data_pages >= KMIG_ZEROCOPY_PAGES;
    rc = send_pieces(link, iov, 2, runs_to_iov(chunk, iov + 2), by_reference);
    kmig_count(&round->busy_ns, kmig_now_ns() - began_ns);
    if (rc == 0)
        kmig_count(&round->bytes_sent, sizeof(header) + header.length);
    return rc;
}

int kmig_stream_send_some(struct kmig_memory *memory, struct kmig_round *round, int fd, uint32_t *sequence,
                          uint64_t most_pages, uint64_t most_ns)
{
    const struct kmig_link link = {
        .fd = fd,
        .abort_fd = round->abort_fd,
        .timeout_ms = round->timeout_ms,
        .zerocopy = round->zerocopy,
        .splice = round->splice,
    };
    uint64_t first = round->pages_done, began_ns = kmig_now_ns();
    struct kmig_chunk chunk;
    int rc;

    while ((rc = kmig_round_next(memory, round, &chunk, NULL)) > 0) {
        rc = kmig_aborted(round->abort_fd) ? -ECANCELED : send_chunk(round, &link, &chunk, *sequence);
        if (rc < 0) {
            kmig_round_put_back(memory, round, &chunk);
            break;
        }
        ++*sequence;
        if (round->pages_done - first >= most_pages || kmig_now_ns() - began_ns >= most_ns)
            return 1;
    }
    return rc;
}

// Take in a header that was received. Returns 0, -EPROTO or -EBADMSG.
static int take_header(struct kmig_incoming *in, const struct kmig_frame_header *header)
{
    if (!kmig_frame_has_magic(header))
        return -EPROTO;
    if (header->header_checksum != kmig_frame_header_checksum(header))
        return -EBADMSG;
    if (header->sequence != in->sequence)
        return -EPROTO;
    in->sequence++;
    in->kind = header->kind;
    in->flags = header->flags;
    in->length = header->length;
    in->checksum = header->checksum;
    in->has_payload = in->frame_flags = in->nr_runs = in->nr_data_pages = 0;
    kmig_count(&in->bytes_received, sizeof(*header));
    return 0;
}

static int recv_header(struct kmig_incoming *in, const struct kmig_link *link)
{
    struct kmig_frame_header header;
    struct iovec iov = {&header, sizeof(header)};
    int rc = kmig_link_recv(link, &iov, 1);

    return rc ? rc : take_header(in, &header);
}

// The payload of a control frame whose header was taken in, if there is room for it here.
static int recv_small_payload(struct kmig_incoming *in, const struct kmig_link *link)
{
    struct iovec iov = {in->payload, in->length};

    if (in->length > sizeof(in->payload))
        return 0;
    int rc = in->length ? kmig_link_recv(link, &iov, 1) : 0;
    in->has_payload = rc == 0;
    return rc;
}

int kmig_stream_recv_frame(struct kmig_incoming *in, int fd, struct kmig_zerocopy *zerocopy)
{
    uint64_t now = kmig_now_ns();
    const struct kmig_link link = {.fd = fd,
                                   .abort_fd = in->abort_fd,
                                   .timeout_ms = in->timeout_ms,
                                   .zerocopy = zerocopy,
                                   .until_ns = now + (uint64_t)in->timeout_ms * 1000000,
                                   .spin_until_ns = now + (uint64_t)in->spin_us * 1000};
    struct kmig_frame_header header;
    struct iovec iov = {&header, sizeof(header)};

    if (kmig_aborted(in->abort_fd))
        return -ECANCELED;
    int rc = kmig_link_recv(&link, &iov, 1);
    if (rc)
        return rc;
    if (take_header(in, &header)) {
        memcpy(in->payload, &header, sizeof(header));
        return 0;
    }
    rc = in->kind == FRAME_PAGES ? 0 : recv_small_payload(in, &link);
    return rc ? rc : 1;
}

// Behind the table of a frame with delta runs: the sum of their bases, see api/delta.h.
static size_t bases_bytes(uint32_t flags)
{
    return flags & PAGES_DELTA ? sizeof(uint64_t) : 0;
}

// Whether the sizes in a PAGES frame agree with its header and are within bounds.
static bool head_is_sound(const struct kmig_incoming *in, const struct pages_head *head)
{
    return head->nr_runs > 0 && head->nr_runs <= KMIG_CHUNK_PAGES && !(head->flags & ~(uint32_t)(PAGES_ZSTD | PAGES_DELTA)) &&
           head->data_bytes <= KMIG_CHUNK_PAGES * KMIG_PAGE_BYTES + ZSTD_SLACK_BYTES &&
           in->length == table_bytes(head->nr_runs) + bases_bytes(head->flags) + head->data_bytes;
}

// Whether as much data is announced as the pages of the table take.
static bool data_bytes_are_sound(const struct kmig_incoming *in, uint64_t data_bytes)
{
    if (in->frame_flags & PAGES_ZSTD)
        return (data_bytes > 0) == (in->nr_data_pages > 0);
    return data_bytes == (uint64_t)in->nr_data_pages * KMIG_PAGE_BYTES;
}

static int recv_table(struct kmig_memory *memory, struct kmig_incoming *in, const struct kmig_link *link)
{
    struct pages_table table;
    struct iovec iov = {&table.head, sizeof(table.head)};

    if (in->length < sizeof(table.head))
        return -EPROTO;
    int rc = kmig_link_recv(link, &iov, 1);
    if (rc)
        return rc;
    if (!head_is_sound(in, &table.head))
        return -EPROTO;
    size_t head_bytes = table_bytes(table.head.nr_runs) + bases_bytes(table.head.flags);
    iov = (struct iovec){table.run, head_bytes - sizeof(table.head)};
    rc = kmig_link_recv(link, &iov, 1);
    if (rc)
        return rc;
    if (kmig_hash(&table, head_bytes) != in->checksum)
        return -EBADMSG;
    long nr_data = kmig_table_check(memory, table.run, table.head.nr_runs, KMIG_RUN_DELTA);
    if (nr_data < 0)
        return (int)nr_data;
    memcpy(in->run, table.run, table.head.nr_runs * sizeof(*table.run));
    in->nr_runs = table.head.nr_runs;
    in->nr_data_pages = (uint32_t)nr_data;
    in->frame_flags = table.head.flags;
    in->length = table.head.data_bytes;
    kmig_count(&in->bytes_received, head_bytes);
    if (!data_bytes_are_sound(in, in->length))
        return -EPROTO;
    const uint8_t *bases = (const uint8_t *)&table + table_bytes(in->nr_runs);
    return kmig_delta_check(memory, in->run, in->nr_runs, in->frame_flags & PAGES_DELTA ? bases : NULL);
}

static int recv_data(struct kmig_memory *memory, struct kmig_incoming *in, const struct kmig_link *link)
{
    struct iovec iov[KMIG_CHUNK_PAGES];
    size_t nr = 0;

    for (uint32_t i = 0; i < in->nr_runs; i++)
        if (in->run[i].kind == KMIG_RUN_DATA)
            iov[nr++] = (struct iovec){kmig_memory_hva(memory, in->run[i].gfn),
                                       (size_t)in->run[i].nr_pages * KMIG_PAGE_BYTES};
    int rc = kmig_link_recv(link, iov, nr);
    if (rc)
        return rc;
    for (uint32_t i = 0; i < in->nr_runs; i++) {
        kmig_run_received(memory, &in->run[i]);
        kmig_count(in->run[i].kind == KMIG_RUN_DATA ? &in->pages_received : &in->pages_cleared, in->run[i].nr_pages);
    }
    kmig_count(&in->bytes_received, in->length);
    return 0;
}

int kmig_stream_recv_pages(struct kmig_memory *memory, struct kmig_incoming *in, int fd)
{
    struct kmig_link link = {.fd = fd,
                             .abort_fd = in->abort_fd,
                             .timeout_ms = in->timeout_ms,
                             .spin_until_ns = kmig_now_ns() + (uint64_t)in->spin_us * 1000};

    for (;;) {
        if (kmig_aborted(in->abort_fd))
            return -ECANCELED;
        int rc = recv_header(in, &link);
        if (rc)
            return rc;
        if (in->kind != FRAME_PAGES) {
            link.until_ns = kmig_now_ns() + (uint64_t)in->timeout_ms * 1000000;
            rc = recv_small_payload(in, &link);
            return rc ? rc : 1;
        }
        link.spin_until_ns = 0;
        rc = recv_table(memory, in, &link);
        if (rc)
            return rc;
        if (in->frame_flags)
            return 1;
        rc = recv_data(memory, in, &link);
        if (rc)
            return rc;
    }
}
