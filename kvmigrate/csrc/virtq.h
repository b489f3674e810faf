// The device's side of a split virtqueue (virtio 1.2, 2.7), straight on guest memory, for what serves a device in C.
//
// A serve function is a loop around kmig_virtio_wait:
//
//     while ((rc = kmig_virtio_wait(device, extra, nr_extra, &queues)) > 0)
//         if (queues & 1)
//             while (!kmig_virtio_wanted(device) && (rc = kmig_virtq_pop(device, 0, &chain)) > 0) {
//                 … the request, by readv and writev on chain.iov …
//                 kmig_virtq_push(device, 0, &chain, nr_bytes_written);
//                 kmig_virtq_notify(device, 0);
//             }
//     return rc;
//
// The guest is hostile and writes into the ring while we look: everything is read once, checked, then used. A driver that
// breaks the rules has its device marked broken (DEVICE_NEEDS_RESET and a configuration interrupt, 2.1.2); pop then finds
// nothing more. For a request that makes no sense (a header cut short, no room for a reply) call kmig_virtio_break.
#ifndef KMIG_VIRTQ_H
#define KMIG_VIRTQ_H

#include <poll.h>
#include <sys/uio.h>

#include "core.h"

#define KMIG_VIRTIO_F_INDIRECT_DESC 28
#define KMIG_VIRTIO_F_EVENT_IDX 29
// A chain has at most as many descriptors as the queue has entries (2.7.5.3.1), and a buffer that crosses into the next
// memory slot takes one iovec more.
#define KMIG_VIRTQ_MAX_IOV (KMIG_VIRTQ_MAX_SIZE + KMIG_MAX_SLOTS)

// One request: iov[0..nr_out) is what the driver wrote, iov[nr_out..nr_out + nr_in) what the device may write.
// Both hold at most 4 GiB - 1 in all.
struct kmig_chain {
    uint16_t head;
    uint32_t nr_out;
    uint32_t nr_in;
    uint64_t out_bytes;
    uint64_t in_bytes;
    struct iovec iov[KMIG_VIRTQ_MAX_IOV];
};

// Wait until a queue is kicked, one of extra (may be NULL) is ready, or somebody wants the thread; park here while the
// device is paused. Returns 1 with a bit in *ret_queues for every queue that must be looked at (all after a resume, none
// when only extra is ready), 0 when the thread must go (kmig_virtio_quit), or -errno.
int kmig_virtio_wait(struct kmig_virtio *device, struct pollfd *extra, uint32_t nr_extra, uint32_t *ret_queues);

// The device's thread cannot go on, for the reason -errno: mark the device broken, so that driver and user hear of it, and
// have nobody wait for the thread. kmig_virtio_wait does it when it fails. Returns rc.
int kmig_virtio_fail(struct kmig_virtio *device, int rc);

// Whether a pause or a quit waits for this thread: finish the request in hand and go back to kmig_virtio_wait. What is
// still in the queue is found after the resume.
bool kmig_virtio_wanted(const struct kmig_virtio *device);

// Whether the driver took feature bit number `bit`.
static inline bool kmig_virtio_has(const struct kmig_virtio *device, unsigned bit)
{
    return device->features >> bit & 1;
}

// Take the next request. Returns 1 with a chain; 0 when the queue is empty, not ready, or the device broken (also: broken
// right now, by this very request). On empty, the event index asks for the next kick.
int kmig_virtq_pop(struct kmig_virtio *device, uint32_t index, struct kmig_chain *chain);

// Undo the latest pop: the next one finds the same request (a network device without a packet for it).
void kmig_virtq_unpop(struct kmig_virtio *device, uint32_t index);

// Give a request back, of whose in-buffers the first `written` bytes were written. Marks those pages and the ring's dirty,
// after their bytes are there. fill leaves it invisible to the driver until flush: a packet over several buffers must
// appear at once (5.1.6.4). push is both. `nr_filled` is how many were filled since the last flush.
void kmig_virtq_fill(struct kmig_virtio *device, uint32_t index, const struct kmig_chain *chain, uint32_t written,
                     uint32_t nr_filled);
void kmig_virtq_flush(struct kmig_virtio *device, uint32_t index, uint32_t nr_filled);
void kmig_virtq_push(struct kmig_virtio *device, uint32_t index, const struct kmig_chain *chain, uint32_t written);

// Interrupt the driver for what was pushed, unless it asked not to be (NO_INTERRUPT, or its event index).
void kmig_virtq_notify(struct kmig_virtio *device, uint32_t index);

// Mark the first size_bytes of nr iovecs in guest memory dirty: for bytes written that `written` above does not cover.
void kmig_virtio_mark(struct kmig_virtio *device, const struct iovec *iov, uint32_t nr, uint64_t size_bytes);

// Copy size_bytes at `offset` of nr iovecs out of or into them; how many bytes there were. Writing marks nothing dirty.
uint64_t kmig_iov_read(const struct iovec *iov, uint32_t nr, uint64_t offset, void *data, uint64_t size_bytes);
uint64_t kmig_iov_write(const struct iovec *iov, uint32_t nr, uint64_t offset, const void *data, uint64_t size_bytes);

// The iovecs of size_bytes at `offset` of nr iovecs; ret has room for nr. How many there are.
uint32_t kmig_iov_slice(const struct iovec *iov, uint32_t nr, uint64_t offset, uint64_t size_bytes, struct iovec *ret);

#endif
