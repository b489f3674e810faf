// PAGES frames over a socket. The layout of a frame is specified in state/frame.py.
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "internal.h"

#define FRAME_PAGES 3
#define FLAG_MANDATORY 1
#define PAGES_ZSTD 1
#define PAGES_DELTA 2
// A zstd frame of pages that do not shrink is this much larger than they are (ZSTD_compressBound, rounded up).
#define ZSTD_SLACK_BYTES (KMIG_CHUNK_PAGES * KMIG_PAGE_BYTES / 256 + 512)

#define SMALL_BYTES (64 << 10)
#define LOW_WATER_BYTES (512 << 10)

static const uint8_t magic[4] = {'K', 'V', 'M', 'G'};

// The machine is little endian, like the wire: KVM on x86-64 is all there is.
struct frame_header {
    uint8_t magic[4];
    uint16_t kind;
    uint16_t flags;
    uint64_t length;
    uint64_t checksum;
    uint32_t sequence;
    uint32_t header_checksum;
};

struct pages_head {
    uint32_t nr_runs;
    uint32_t flags;
    uint64_t data_bytes;
};

_Static_assert(sizeof(struct frame_header) == 32 && sizeof(struct pages_head) == 16, "the wire format");
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

static uint32_t header_checksum(const struct frame_header *header)
{
    return (uint32_t)kmig_hash(header, offsetof(struct frame_header, header_checksum));
}

struct link {
    int fd;
    int abort_fd;
    int64_t timeout_ms;     // how long the peer may let pass without taking or giving a byte
    uint64_t until_ns;      // when all must be there, or 0
    uint64_t spin_until_ns; // until when to look again and again instead of to sleep
};

// Whether fd is ready for events before spin_until_ns. To wake a sleeper takes the kernel longer than a frame of the
// blackout is away; but the one that is to send it may have no other processor than this, so each look gives it up.
static int spin(struct pollfd *poller, const struct link *link)
{
    int rc = 0;

    while (rc == 0 && kmig_now_ns() < link->spin_until_ns) {
        rc = poll(poller, 2, 0);
        if (rc == 0)
            sched_yield();
    }
    return rc;
}

// Wait until the socket is ready for events.
static int wait_ready(const struct link *link, short events)
{
    struct pollfd poller[2] = {{.fd = link->fd, .events = events}, {.fd = link->abort_fd, .events = POLLIN}};
    uint64_t until = kmig_now_ns() + (uint64_t)link->timeout_ms * 1000000;

    if (link->until_ns && link->until_ns < until)
        until = link->until_ns;
    for (;;) {
        int rc = spin(poller, link);
        uint64_t now = kmig_now_ns();
        uint64_t left = now < until ? until - now : 0;
        struct timespec wait = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
        if (rc == 0)
            rc = ppoll(poller, 2, &wait, NULL);
        if (rc < 0 && errno != EINTR)
            return -errno;
        if (rc > 0 && poller[1].revents)
            return -ECANCELED;
        if (rc > 0)
            return 0;
        if (rc == 0 && !left)
            return -ETIMEDOUT;
    }
}

// Take moved bytes off the front of the list. Returns what is left of it.
static struct iovec *advance(struct iovec *iov, size_t *nr_iov, size_t moved)
{
    while (*nr_iov && moved >= iov->iov_len) {
        moved -= iov->iov_len;
        iov++;
        (*nr_iov)--;
    }
    if (*nr_iov) {
        iov->iov_base = (uint8_t *)iov->iov_base + moved;
        iov->iov_len -= moved;
    }
    return iov;
}

static int send_all(const struct link *link, struct iovec *iov, size_t nr_iov)
{
    while (nr_iov) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = nr_iov};
        ssize_t sent = sendmsg(link->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) {
            iov = advance(iov, &nr_iov, (size_t)sent);
        } else if (errno == EAGAIN) {
            int rc = wait_ready(link, POLLOUT);
            if (rc)
                return rc;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

static size_t bytes_left(const struct iovec *iov, size_t nr_iov)
{
    size_t left = 0;
    for (size_t i = 0; i < nr_iov; i++)
        left += iov[i].iov_len;
    return left;
}

// How many bytes wake a reader (SO_RCVLOWAT); a kind of socket that knows no such thing wakes it for any.
static void set_low_water(int fd, size_t size_bytes, size_t *low_water)
{
    int value = (int)size_bytes;

    if (size_bytes != *low_water)
        setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &value, sizeof(value));
    *low_water = size_bytes;
}

// Wait for a good part of what is left, not for each packet of it: on a busy host every waking costs more than its
// packet. When the time is up, less may have come all the same: a slow peer is not a dead one.
static int wait_for_bytes(const struct link *link, size_t left, size_t *low_water)
{
    size_t want = left < LOW_WATER_BYTES ? left : LOW_WATER_BYTES;

    set_low_water(link->fd, left > SMALL_BYTES ? want : 1, low_water);
    int rc = wait_ready(link, POLLIN);
    if (rc == -ETIMEDOUT && *low_water > 1) {
        struct pollfd poller = {.fd = link->fd, .events = POLLIN};
        set_low_water(link->fd, 1, low_water);
        if (poll(&poller, 1, 0) > 0)
            return 0;
    }
    return rc;
}

static int recv_all(const struct link *link, struct iovec *iov, size_t nr_iov)
{
    size_t low_water = 1;
    int rc = 0;

    while (nr_iov && !rc) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = nr_iov};
        ssize_t got = recvmsg(link->fd, &message, MSG_DONTWAIT);
        if (got > 0)
            iov = advance(iov, &nr_iov, (size_t)got);
        else if (got == 0)
            rc = -ECONNRESET;
        else if (errno == EAGAIN)
            rc = wait_for_bytes(link, bytes_left(iov, nr_iov), &low_water);
        else if (errno != EINTR)
            rc = -errno;
    }
    // Whoever reads the socket next may wait for less.
    set_low_water(link->fd, 1, &low_water);
    return rc;
}

int kmig_stream_send(int fd, const void *data, uint64_t size_bytes, int abort_fd, int64_t timeout_ms)
{
    const struct link link = {.fd = fd, .abort_fd = abort_fd, .timeout_ms = timeout_ms};
    struct iovec iov = {(void *)data, size_bytes};

    if (kmig_aborted(abort_fd))
        return -ECANCELED;
    return size_bytes ? send_all(&link, &iov, 1) : 0;
}

int kmig_stream_recv(int fd, void *data, uint64_t size_bytes, int abort_fd, int64_t timeout_ms, uint64_t spin_us)
{
    uint64_t now = kmig_now_ns();
    const struct link link = {.fd = fd,
                              .abort_fd = abort_fd,
                              .timeout_ms = timeout_ms,
                              .until_ns = now + (uint64_t)timeout_ms * 1000000,
                              .spin_until_ns = now + spin_us * 1000};
    struct iovec iov = {data, size_bytes};

    if (kmig_aborted(abort_fd))
        return -ECANCELED;
    return size_bytes ? recv_all(&link, &iov, 1) : 0;
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

static int send_chunk(struct kmig_round *round, const struct link *link, const struct kmig_chunk *chunk,
                      uint32_t sequence)
{
    uint64_t data_bytes = (uint64_t)chunk->nr_data_pages * KMIG_PAGE_BYTES;
    struct pages_table table = {.head = {chunk->nr_runs, 0, data_bytes}};
    size_t head_bytes = table_bytes(chunk->nr_runs);
    struct frame_header header = {
        .kind = FRAME_PAGES, .flags = FLAG_MANDATORY, .length = head_bytes + data_bytes, .sequence = sequence};
    struct iovec iov[KMIG_CHUNK_PAGES + 2] = {{&header, sizeof(header)}, {&table, head_bytes}};

    memcpy(header.magic, magic, sizeof(magic));
    memcpy(table.run, chunk->run, chunk->nr_runs * sizeof(*chunk->run));
    header.checksum = kmig_hash(&table, head_bytes);
    header.header_checksum = header_checksum(&header);
    int rc = kmig_round_pace(round, sizeof(header) + header.length);
    if (rc)
        return rc;
    uint64_t began_ns = kmig_now_ns();
    rc = send_all(link, iov, 2 + runs_to_iov(chunk, iov + 2));
    kmig_count(&round->busy_ns, kmig_now_ns() - began_ns);
    if (rc == 0)
        kmig_count(&round->bytes_sent, sizeof(header) + header.length);
    return rc;
}

int kmig_stream_send_some(struct kmig_memory *memory, struct kmig_round *round, int fd, uint32_t *sequence,
                          uint64_t most_pages, uint64_t most_ns)
{
    const struct link link = {.fd = fd, .abort_fd = round->abort_fd, .timeout_ms = round->timeout_ms};
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

static int recv_header(struct kmig_incoming *in, const struct link *link)
{
    struct frame_header header;
    struct iovec iov = {&header, sizeof(header)};
    int rc = recv_all(link, &iov, 1);

    if (rc)
        return rc;
    if (memcmp(header.magic, magic, sizeof(magic)) != 0)
        return -EPROTO;
    if (header.header_checksum != header_checksum(&header))
        return -EBADMSG;
    if (header.sequence != in->sequence)
        return -EPROTO;
    in->sequence++;
    in->kind = header.kind;
    in->flags = header.flags;
    in->length = header.length;
    in->checksum = header.checksum;
    in->frame_flags = in->nr_runs = in->nr_data_pages = 0;
    kmig_count(&in->bytes_received, sizeof(header));
    return 0;
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

static int recv_table(struct kmig_memory *memory, struct kmig_incoming *in, const struct link *link)
{
    struct pages_table table;
    struct iovec iov = {&table.head, sizeof(table.head)};

    if (in->length < sizeof(table.head))
        return -EPROTO;
    int rc = recv_all(link, &iov, 1);
    if (rc)
        return rc;
    if (!head_is_sound(in, &table.head))
        return -EPROTO;
    size_t head_bytes = table_bytes(table.head.nr_runs) + bases_bytes(table.head.flags);
    iov = (struct iovec){table.run, head_bytes - sizeof(table.head)};
    rc = recv_all(link, &iov, 1);
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

static int recv_data(struct kmig_memory *memory, struct kmig_incoming *in, const struct link *link)
{
    struct iovec iov[KMIG_CHUNK_PAGES];
    size_t nr = 0;

    for (uint32_t i = 0; i < in->nr_runs; i++)
        if (in->run[i].kind == KMIG_RUN_DATA)
            iov[nr++] = (struct iovec){kmig_memory_hva(memory, in->run[i].gfn),
                                       (size_t)in->run[i].nr_pages * KMIG_PAGE_BYTES};
    int rc = recv_all(link, iov, nr);
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
    struct link link = {.fd = fd,
                        .abort_fd = in->abort_fd,
                        .timeout_ms = in->timeout_ms,
                        .spin_until_ns = kmig_now_ns() + (uint64_t)in->spin_us * 1000};

    for (;;) {
        if (kmig_aborted(in->abort_fd))
            return -ECANCELED;
        int rc = recv_header(in, &link);
        if (rc)
            return rc;
        if (in->kind != FRAME_PAGES)
            return 1;
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
