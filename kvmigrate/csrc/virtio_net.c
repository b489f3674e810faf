// The thread of a network device (virtio 1.2, 5.1): packets between a tap and the queues, by one read or write each.
//
// The tap's own header is the device's, so a packet goes through untouched, offloads and all. What is received is read
// straight into the guest's first buffer; only what does not fit there is copied once, into the buffers after it.
#include <endian.h>
#include <linux/if_tun.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "internal.h"
#include "virtq.h"

// Feature bits (5.1.3).
#define F_GUEST_CSUM 1
#define F_GUEST_TSO4 7
#define F_GUEST_TSO6 8
#define F_MRG_RXBUF 15
#define F_GUEST_ANNOUNCE 21

// struct virtio_net_hdr_v1 (5.1.6) and its last field.
#define HEADER_BYTES 12
#define NUM_BUFFERS_OFFSET 10
// More than a header, the 64 KiB of a segmented packet and what Ethernet puts before them.
#define PACKET_BYTES (68 << 10)
// Packets in a row of one direction, before the other one has its turn and the driver is interrupted.
#define BATCH 64

#define CLASS_ANNOUNCE 3
#define ANNOUNCE_ACK 0
#define CTRL_OK 0
#define CTRL_ERR 1

#define ANNOUNCE_TIMES 5
#define ANNOUNCE_EVERY_NS 100000000
#define FRAME_BYTES 60

// What the thread works with.
struct link {
    struct kmig_virtio *device;
    struct kmig_virtio_net *net;
    struct pollfd poll[2];     // the tap, not looked at while the guest has no buffer; the timer
    uint64_t features;         // for which the tap was set up
    uint64_t pending;          // bytes of a packet in `bounce` that waits for buffers
    struct kmig_chain first;   // of a packet; `more` are the chains after it, one by one
    struct kmig_chain more;
    struct iovec iov[KMIG_VIRTQ_MAX_IOV + 1];
    uint8_t bounce[PACKET_BYTES];
};

int kmig_virtio_net_create(int fd, const uint8_t *mac, struct kmig_virtio_net **ret)
{
    struct kmig_virtio_net *net = calloc(1, sizeof(*net));
    if (!net)
        return -ENOMEM;
    net->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (net->timer_fd < 0) {
        int rc = -errno;
        free(net);
        return rc;
    }
    net->fd = fd;
    net->status = KMIG_NET_S_LINK_UP;
    memcpy(net->mac, mac, sizeof(net->mac));
    *ret = net;
    return 0;
}

void kmig_virtio_net_destroy(struct kmig_virtio_net *net)
{
    if (!net)
        return;
    close(net->timer_fd);
    free(net);
}

static struct iovec *in_iov(struct kmig_chain *chain)
{
    return chain->iov + chain->nr_out;
}

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

// The tap is gone: its interface was deleted. The guest sees a cable that was pulled.
static void lose_link(struct link *link)
{
    link->poll[0].fd = -1;
    __atomic_fetch_and(&link->net->status, ~(uint32_t)KMIG_NET_S_LINK_UP, __ATOMIC_SEQ_CST);
    kmig_virtio_interrupt(link->device, KMIG_VIRTIO_ISR_CONFIG);
}

static bool link_is_up(const struct link *link)
{
    return __atomic_load_n(&link->net->status, __ATOMIC_RELAXED) & KMIG_NET_S_LINK_UP;
}

// Let the tap hand over only what this driver said it can take.
static void follow_features(struct link *link)
{
    unsigned long offload = 0;

    if (link->features == link->device->features)
        return;
    link->features = link->device->features;
    // Received for another driver, or for this one before it agreed to take it in this form.
    link->pending = 0;
    if (kmig_virtio_has(link->device, F_GUEST_CSUM)) {
        offload = TUN_F_CSUM;
        offload |= kmig_virtio_has(link->device, F_GUEST_TSO4) ? TUN_F_TSO4 : 0;
        offload |= kmig_virtio_has(link->device, F_GUEST_TSO6) ? TUN_F_TSO6 : 0;
    }
    // A tap that refuses cuts and sums packets itself: slower, not wrong.
    (void)ioctl(link->net->fd, TUNSETOFFLOAD, offload);
}

// Read one packet into the first buffer, and into `bounce` at the same offset what does not fit. Its size, or -errno.
static ssize_t read_packet(struct link *link)
{
    uint32_t nr = link->first.nr_in;
    uint64_t room = link->first.in_bytes;
    ssize_t got;

    memcpy(link->iov, in_iov(&link->first), nr * sizeof(*link->iov));
    if (room < PACKET_BYTES)
        link->iov[nr++] = (struct iovec){link->bounce + room, PACKET_BYTES - room};
    do
        got = readv(link->net->fd, link->iov, (int)nr);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got;
}

// Give the first buffer back untaken. What may lie in it already is marked: both sides of a move must agree on it.
static void put_back(struct link *link, uint64_t written)
{
    kmig_virtio_mark(link->device, in_iov(&link->first), link->first.nr_in, smaller(written, link->first.in_bytes));
    kmig_virtq_unpop(link->device, KMIG_NET_RX);
}

// Copy what did not fit into the first buffer into the next ones. How many buffers the packet has, or 0 when the guest
// has not that many: then only the first is still taken.
static uint32_t spread(struct link *link, uint64_t size_bytes)
{
    uint64_t done = smaller(size_bytes, link->first.in_bytes);
    uint32_t nr = 1;

    while (done < size_bytes) {
        int rc = kmig_virtq_pop(link->device, KMIG_NET_RX, &link->more);
        if (rc > 0 && !link->more.in_bytes) {
            kmig_virtio_break(link->device);
            nr++;
        }
        if (rc <= 0 || !link->more.in_bytes) {
            while (--nr)
                kmig_virtq_unpop(link->device, KMIG_NET_RX);
            return 0;
        }
        uint64_t put = kmig_iov_write(in_iov(&link->more), link->more.nr_in, 0, link->bounce + done, size_bytes - done);
        kmig_virtq_fill(link->device, KMIG_NET_RX, &link->more, (uint32_t)put, nr++);
        done += put;
    }
    return nr;
}

// Hand over a packet that lies in the first buffer and in `bounce`. False when it waits for more buffers.
static bool deliver(struct link *link, uint64_t size_bytes)
{
    struct kmig_chain *first = &link->first;
    bool fits = size_bytes <= first->in_bytes;

    if (size_bytes < HEADER_BYTES || (!fits && !kmig_virtio_has(link->device, F_MRG_RXBUF))) {
        put_back(link, size_bytes);
        kmig_count(&link->net->nr_dropped, 1);
        return true;
    }
    uint32_t nr = spread(link, size_bytes);
    if (!nr) {
        kmig_iov_read(in_iov(first), first->nr_in, 0, link->bounce, first->in_bytes);
        link->pending = size_bytes;
        put_back(link, size_bytes);
        return false;
    }
    uint16_t num_buffers = htole16((uint16_t)nr);
    kmig_iov_write(in_iov(first), first->nr_in, NUM_BUFFERS_OFFSET, &num_buffers, sizeof(num_buffers));
    kmig_virtq_fill(link->device, KMIG_NET_RX, first, (uint32_t)smaller(size_bytes, first->in_bytes), 0);
    kmig_virtq_flush(link->device, KMIG_NET_RX, nr);
    kmig_count(&link->net->nr_received, 1);
    return true;
}

// The packet that waits, or the next one of the tap, into the first buffer. Its size; 0: there is none.
static uint64_t next_packet(struct link *link)
{
    uint64_t size_bytes = link->pending;

    if (size_bytes) {
        kmig_iov_write(in_iov(&link->first), link->first.nr_in, 0, link->bounce,
                       smaller(size_bytes, link->first.in_bytes));
        link->pending = 0;
        return size_bytes;
    }
    ssize_t got = read_packet(link);
    if (got > 0)
        return (uint64_t)got;
    kmig_virtq_unpop(link->device, KMIG_NET_RX);
    // The end of file, and these errors, stay: to poll on would be a busy loop.
    if (got == 0 || got == -EIO || got == -EBADFD || got == -ENODEV)
        lose_link(link);
    return 0;
}

// One packet from the tap to the guest. False when there is none, or no buffer for it.
static bool receive_one(struct link *link)
{
    // Without a buffer the packets wait in the tap, which drops what is too much.
    bool has_buffer = kmig_virtq_pop(link->device, KMIG_NET_RX, &link->first) > 0;

    if (has_buffer && link->first.in_bytes < HEADER_BYTES) {
        kmig_virtio_break(link->device);
        has_buffer = false;
    }
    if (!has_buffer) {
        link->poll[0].fd = -1;
        return false;
    }
    uint64_t size_bytes = next_packet(link);
    if (!size_bytes)
        return false;
    if (!deliver(link, size_bytes)) {
        link->poll[0].fd = -1;
        return false;
    }
    return true;
}

// True when there may be more.
static bool receive(struct link *link)
{
    uint32_t nr = 0;

    if (link->poll[0].fd < 0)
        return false;
    while (nr < BATCH && !kmig_virtio_wanted(link->device) && receive_one(link))
        nr++;
    if (nr)
        kmig_virtq_notify(link->device, KMIG_NET_RX);
    return nr == BATCH;
}

// What the tap does not take is dropped: a network promises no more, and a NIC does the same.
static void send_packet(struct kmig_virtio_net *net, const struct iovec *iov, uint32_t nr, uint64_t size_bytes)
{
    ssize_t put = -1;

    if (size_bytes <= PACKET_BYTES)
        do
            put = writev(net->fd, iov, (int)nr);
        while (put < 0 && errno == EINTR);
    kmig_count(put < 0 ? &net->nr_dropped : &net->nr_sent, 1);
}

// True when there may be more.
static bool transmit(struct link *link)
{
    struct kmig_chain *chain = &link->first;
    uint32_t nr = 0;

    while (nr < BATCH && !kmig_virtio_wanted(link->device) &&
           kmig_virtq_pop(link->device, KMIG_NET_TX, chain) > 0) {
        if (chain->out_bytes < HEADER_BYTES) {
            kmig_virtio_break(link->device);
            break;
        }
        send_packet(link->net, chain->iov, chain->nr_out, chain->out_bytes);
        kmig_virtq_push(link->device, KMIG_NET_TX, chain, 0);
        nr++;
    }
    if (nr)
        kmig_virtq_notify(link->device, KMIG_NET_TX);
    return nr == BATCH;
}

static uint8_t obey(struct link *link, const uint8_t command[2])
{
    if (command[0] != CLASS_ANNOUNCE || command[1] != ANNOUNCE_ACK || !kmig_virtio_has(link->device, F_GUEST_ANNOUNCE))
        return CTRL_ERR;
    __atomic_fetch_and(&link->net->status, ~(uint32_t)KMIG_NET_S_ANNOUNCE, __ATOMIC_SEQ_CST);
    return CTRL_OK;
}

static void control(struct link *link)
{
    struct kmig_chain *chain = &link->first;
    uint8_t command[2];

    while (!kmig_virtio_wanted(link->device) && kmig_virtq_pop(link->device, KMIG_NET_CTRL, chain) > 0) {
        if (kmig_iov_read(chain->iov, chain->nr_out, 0, command, sizeof(command)) < sizeof(command) ||
            !chain->in_bytes) {
            kmig_virtio_break(link->device);
            return;
        }
        uint8_t ack = obey(link, command);
        // The answer is the only byte that the device writes (5.1.6.5).
        kmig_iov_write(in_iov(chain), chain->nr_in, 0, &ack, sizeof(ack));
        kmig_virtq_push(link->device, KMIG_NET_CTRL, chain, sizeof(ack));
        kmig_virtq_notify(link->device, KMIG_NET_CTRL);
    }
}

// "Who has my address" (RFC 903): an Ethernet broadcast that means nothing to a host, and says to each switch where mac is.
static void rarp_frame(const uint8_t mac[6], uint8_t frame[FRAME_BYTES])
{
    static const uint8_t type_to_operation[] = {0x80, 0x35, 0, 1, 0x08, 0, 6, 4, 0, 3};

    memset(frame, 0, FRAME_BYTES);
    memset(frame, 0xFF, 6);
    memcpy(frame + 6, mac, 6);
    memcpy(frame + 12, type_to_operation, sizeof(type_to_operation));
    memcpy(frame + 22, mac, 6);
    memcpy(frame + 32, mac, 6);
}

static void announce_when_due(struct link *link)
{
    static const struct itimerspec never;
    uint8_t header[HEADER_BYTES] = {0}, frame[FRAME_BYTES];
    struct iovec iov[2] = {{header, sizeof(header)}, {frame, sizeof(frame)}};
    struct kmig_virtio_net *net = link->net;
    uint64_t nr_expired;

    if (read(net->timer_fd, &nr_expired, sizeof(nr_expired)) != sizeof(nr_expired))
        return;
    uint32_t left = __atomic_load_n(&net->nr_announce, __ATOMIC_RELAXED);
    if (left) {
        rarp_frame(net->mac, frame);
        send_packet(net, iov, 2, sizeof(header) + sizeof(frame));
        __atomic_store_n(&net->nr_announce, left - 1, __ATOMIC_RELAXED);
    }
    if (left <= 1)
        timerfd_settime(net->timer_fd, 0, &never, NULL);
}

int kmig_virtio_net_announce(struct kmig_virtio *device, struct kmig_virtio_net *net)
{
    struct itimerspec now_and_then = {.it_value.tv_nsec = 1, .it_interval.tv_nsec = ANNOUNCE_EVERY_NS};

    if (kmig_virtio_has(device, F_GUEST_ANNOUNCE)) {
        __atomic_fetch_or(&net->status, KMIG_NET_S_ANNOUNCE, __ATOMIC_SEQ_CST);
        kmig_virtio_interrupt(device, KMIG_VIRTIO_ISR_CONFIG);
    }
    __atomic_store_n(&net->nr_announce, ANNOUNCE_TIMES, __ATOMIC_RELAXED);
    return timerfd_settime(net->timer_fd, 0, &now_and_then, NULL) < 0 ? -errno : 0;
}

static void serve_queues(struct link *link, uint32_t queues)
{
    bool more = true;

    follow_features(link);
    if (queues >> KMIG_NET_RX & 1)
        link->poll[0].fd = link_is_up(link) ? link->net->fd : -1;
    if (queues >> KMIG_NET_CTRL & 1)
        control(link);
    while (more && !kmig_virtio_wanted(link->device)) {
        more = transmit(link);
        more |= receive(link);
    }
}

int kmig_virtio_net_serve(struct kmig_virtio *device, struct kmig_virtio_net *net)
{
    uint32_t queues;
    struct link *link = calloc(1, sizeof(*link));
    if (!link)
        return kmig_virtio_fail(device, -ENOMEM);
    link->device = device;
    link->net = net;
    link->features = ~UINT64_C(0);
    link->poll[0] = (struct pollfd){.fd = -1, .events = POLLIN};
    link->poll[1] = (struct pollfd){.fd = net->timer_fd, .events = POLLIN};
    int rc;
    while ((rc = kmig_virtio_wait(device, link->poll, 2, &queues)) > 0) {
        announce_when_due(link);
        serve_queues(link, queues);
    }
    free(link);
    return rc;
}
