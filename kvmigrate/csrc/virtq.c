// The device's side of a split virtqueue (virtio 1.2, 2.7). Everything in the rings is the guest's, who may be hostile and
// may change it while it is read: each value is read once.
#include "virtq.h"

#include <linux/virtio_ring.h>
#include <string.h>

#include "bits.h"
#include "internal.h"

_Static_assert(KMIG_VIRTIO_F_INDIRECT_DESC == VIRTIO_RING_F_INDIRECT_DESC, "as in virtio 1.2, 6");
_Static_assert(KMIG_VIRTIO_F_EVENT_IDX == VIRTIO_RING_F_EVENT_IDX, "as in virtio 1.2, 6");

// A table of descriptors that chains run through: the queue's own or an indirect one.
struct table {
    const struct vring_desc *desc;
    uint32_t size;
};

// The fields of a ring that both sides write or read at any time.
static uint16_t load16(const uint16_t *at)
{
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

static uint16_t *used_event(const struct kmig_virtq *queue)
{
    return &((struct vring_avail *)queue->avail_at)->ring[queue->size];
}

static uint16_t *avail_event(const struct kmig_virtq *queue)
{
    return (uint16_t *)&((struct vring_used *)queue->used_at)->ring[queue->size];
}

// Mark what was written to guest memory at `at`; it lies in one slot.
static void mark(struct kmig_memory *memory, const void *at, uint64_t size_bytes)
{
    for (uint32_t i = 0; i < memory->nr_slots && size_bytes; i++) {
        struct kmig_slot *slot = &memory->slot[i];
        uint64_t offset = (uint64_t)((const uint8_t *)at - slot->hva);
        if ((const uint8_t *)at < slot->hva || offset >= slot->nr_pages * KMIG_PAGE_BYTES)
            continue;
        kmig_host_wrote(slot, offset / KMIG_PAGE_BYTES, (offset + size_bytes + KMIG_PAGE_BYTES - 1) / KMIG_PAGE_BYTES);
        return;
    }
}

void kmig_virtio_mark(struct kmig_virtio *device, const struct iovec *iov, uint32_t nr, uint64_t size_bytes)
{
    for (uint32_t i = 0; i < nr && size_bytes; i++) {
        uint64_t part = iov[i].iov_len < size_bytes ? iov[i].iov_len : size_bytes;
        mark(device->memory, iov[i].iov_base, part);
        size_bytes -= part;
    }
}

// Where size_bytes at gpa lie here, when they are RAM of one slot; else NULL.
static void *at_gpa(const struct kmig_memory *memory, uint64_t gpa, uint64_t size_bytes)
{
    const struct kmig_slot *slot = kmig_memory_slot(memory, gpa / KMIG_PAGE_BYTES);
    if (!slot)
        return NULL;
    uint64_t offset = gpa - slot->base_gfn * KMIG_PAGE_BYTES;
    return size_bytes <= slot->nr_pages * KMIG_PAGE_BYTES - offset ? slot->hva + offset : NULL;
}

int kmig_virtio_enable(struct kmig_virtio *device, uint32_t index)
{
    if (index >= device->nr_queues)
        return -EINVAL;
    struct kmig_virtq *queue = &device->queue[index];
    uint64_t size = queue->size;
    if (!size || size > KMIG_VIRTQ_MAX_SIZE || size & (size - 1))
        return -EINVAL;
    if (queue->desc % 16 || queue->avail % 2 || queue->used % 4)
        return -EINVAL;
    // With the two bytes of the event index, whether it is negotiated or not: what RAM has room for a ring without them
    // and none with them, no driver uses.
    queue->desc_at = at_gpa(device->memory, queue->desc, 16 * size);
    queue->avail_at = at_gpa(device->memory, queue->avail, 6 + 2 * size);
    queue->used_at = at_gpa(device->memory, queue->used, 6 + 8 * size);
    if (!queue->desc_at || !queue->avail_at || !queue->used_at)
        return -EFAULT;
    queue->signalled_valid = 0;
    queue->ready = 1;
    return 0;
}

// Add one buffer to the chain; false when it may not be there.
static bool add_buffer(const struct kmig_memory *memory, struct kmig_chain *chain, const struct vring_desc *desc)
{
    bool in = desc->flags & VRING_DESC_F_WRITE;
    uint64_t *bytes = in ? &chain->in_bytes : &chain->out_bytes;
    uint64_t gpa = desc->addr, left = desc->len;

    // What the device may write comes after what it may read (2.7.4.2).
    if (!left || (!in && chain->nr_in) || *bytes + left > UINT32_MAX)
        return false;
    *bytes += left;
    while (left) {
        const struct kmig_slot *slot = kmig_memory_slot(memory, gpa / KMIG_PAGE_BYTES);
        uint32_t nr = chain->nr_out + chain->nr_in;
        if (!slot || nr == KMIG_VIRTQ_MAX_IOV)
            return false;
        uint64_t offset = gpa - slot->base_gfn * KMIG_PAGE_BYTES;
        uint64_t here = slot->nr_pages * KMIG_PAGE_BYTES - offset;
        if (here > left)
            here = left;
        chain->iov[nr] = (struct iovec){slot->hva + offset, here};
        *(in ? &chain->nr_in : &chain->nr_out) += 1;
        gpa += here;
        left -= here;
    }
    return true;
}

static bool read_desc(const struct table *table, uint32_t at, struct vring_desc *desc)
{
    if (at >= table->size)
        return false;
    memcpy(desc, &table->desc[at], sizeof(*desc));
    // The copy is what is checked and used, whatever the guest does to the original meanwhile.
    __asm__ volatile("" ::: "memory");
    return true;
}

// Go into an indirect table: not from within one, not followed by another descriptor, and only when it was negotiated
// (2.7.5.3.1).
static bool enter_indirect(const struct kmig_virtio *device, const struct vring_desc *desc, bool *inside,
                           struct table *table)
{
    if (*inside || desc->flags & VRING_DESC_F_NEXT || !kmig_virtio_has(device, KMIG_VIRTIO_F_INDIRECT_DESC))
        return false;
    if (!desc->len || desc->len % sizeof(*desc))
        return false;
    *inside = true;
    table->desc = at_gpa(device->memory, desc->addr, desc->len);
    table->size = desc->len / sizeof(*desc);
    return table->desc;
}

// Collect the chain that starts at head; false when it breaks the rules. `left` bounds what a loop can cost.
static bool walk(const struct kmig_virtio *device, const struct kmig_virtq *queue, struct kmig_chain *chain)
{
    struct table table = {queue->desc_at, queue->size};
    struct vring_desc desc;
    uint32_t at = chain->head;
    bool inside = false;

    for (uint32_t left = queue->size; left; left--) {
        if (!read_desc(&table, at, &desc))
            return false;
        if (desc.flags & VRING_DESC_F_INDIRECT) {
            if (!enter_indirect(device, &desc, &inside, &table))
                return false;
            at = 0;
            left++;
            continue;
        }
        if (!add_buffer(device->memory, chain, &desc))
            return false;
        if (!(desc.flags & VRING_DESC_F_NEXT))
            return true;
        at = desc.next;
    }
    return false;
}

// How many entries of the available ring are new, which may be more than can be true.
static uint16_t nr_new(const struct kmig_virtq *queue)
{
    return (uint16_t)(load16(&((const struct vring_avail *)queue->avail_at)->idx) - queue->last_avail);
}

// Nothing is new: ask for a kick for the next entry, and look again, since it may have come before that was seen (2.7.10).
static uint16_t ask_for_kick(struct kmig_virtio *device, struct kmig_virtq *queue)
{
    if (!kmig_virtio_has(device, KMIG_VIRTIO_F_EVENT_IDX))
        return 0;
    __atomic_store_n(avail_event(queue), queue->last_avail, __ATOMIC_RELEASE);
    mark(device->memory, avail_event(queue), sizeof(uint16_t));
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return nr_new(queue);
}

int kmig_virtq_pop(struct kmig_virtio *device, uint32_t index, struct kmig_chain *chain)
{
    struct kmig_virtq *queue = &device->queue[index];

    if (!queue->ready || __atomic_load_n(&device->broken, __ATOMIC_RELAXED))
        return 0;
    uint16_t nr = nr_new(queue);
    if (!nr)
        nr = ask_for_kick(device, queue);
    if (!nr)
        return 0;
    chain->head = load16(&((const struct vring_avail *)queue->avail_at)->ring[queue->last_avail % queue->size]);
    chain->nr_out = chain->nr_in = 0;
    chain->out_bytes = chain->in_bytes = 0;
    if (nr > queue->size || !walk(device, queue, chain)) {
        kmig_virtio_break(device);
        return 0;
    }
    queue->last_avail++;
    return 1;
}

void kmig_virtq_unpop(struct kmig_virtio *device, uint32_t index)
{
    device->queue[index].last_avail--;
}

void kmig_virtq_fill(struct kmig_virtio *device, uint32_t index, const struct kmig_chain *chain, uint32_t written,
                     uint32_t nr_filled)
{
    struct kmig_virtq *queue = &device->queue[index];
    struct vring_used *used = queue->used_at;
    struct vring_used_elem *elem = &used->ring[(queue->used_idx + nr_filled) % queue->size];

    kmig_virtio_mark(device, chain->iov + chain->nr_out, chain->nr_in, written);
    elem->id = chain->head;
    elem->len = written;
    mark(device->memory, elem, sizeof(*elem));
}

void kmig_virtq_flush(struct kmig_virtio *device, uint32_t index, uint32_t nr_filled)
{
    struct kmig_virtq *queue = &device->queue[index];
    struct vring_used *used = queue->used_at;

    queue->used_idx = (uint16_t)(queue->used_idx + nr_filled);
    __atomic_store_n(&used->idx, queue->used_idx, __ATOMIC_RELEASE);
    mark(device->memory, &used->idx, sizeof(used->idx));
}

void kmig_virtq_push(struct kmig_virtio *device, uint32_t index, const struct kmig_chain *chain, uint32_t written)
{
    kmig_virtq_fill(device, index, chain, written, 0);
    kmig_virtq_flush(device, index, 1);
}

void kmig_virtq_notify(struct kmig_virtio *device, uint32_t index)
{
    struct kmig_virtq *queue = &device->queue[index];
    uint16_t now = queue->used_idx;
    bool wanted;

    // The index that was just stored must be seen before we look at what the driver wants: it does both the other way
    // round (2.7.7.2).
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (kmig_virtio_has(device, KMIG_VIRTIO_F_EVENT_IDX)) {
        wanted = !queue->signalled_valid || vring_need_event(load16(used_event(queue)), now, queue->signalled);
        queue->signalled = now;
        queue->signalled_valid = 1;
    } else {
        wanted = !(load16(&((const struct vring_avail *)queue->avail_at)->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    }
    if (wanted)
        kmig_virtio_interrupt(device, KMIG_VIRTIO_ISR_USED);
}

// The part of an iovec that lies behind *offset bytes, at most size_bytes of it; *offset becomes what is left to skip.
static struct iovec part_behind(const struct iovec *iov, uint64_t *offset, uint64_t size_bytes)
{
    uint64_t skip = *offset < iov->iov_len ? *offset : iov->iov_len;
    uint64_t left = iov->iov_len - skip;

    *offset -= skip;
    return (struct iovec){(uint8_t *)iov->iov_base + skip, left < size_bytes ? left : size_bytes};
}

uint64_t kmig_iov_read(const struct iovec *iov, uint32_t nr, uint64_t offset, void *data, uint64_t size_bytes)
{
    uint64_t done = 0;

    for (uint32_t i = 0; i < nr && done < size_bytes; i++) {
        struct iovec part = part_behind(&iov[i], &offset, size_bytes - done);
        memcpy((uint8_t *)data + done, part.iov_base, part.iov_len);
        done += part.iov_len;
    }
    return done;
}

uint64_t kmig_iov_write(const struct iovec *iov, uint32_t nr, uint64_t offset, const void *data, uint64_t size_bytes)
{
    uint64_t done = 0;

    for (uint32_t i = 0; i < nr && done < size_bytes; i++) {
        struct iovec part = part_behind(&iov[i], &offset, size_bytes - done);
        memcpy(part.iov_base, (const uint8_t *)data + done, part.iov_len);
        done += part.iov_len;
    }
    return done;
}

uint32_t kmig_iov_slice(const struct iovec *iov, uint32_t nr, uint64_t offset, uint64_t size_bytes, struct iovec *ret)
{
    uint32_t nr_parts = 0;

    for (uint32_t i = 0; i < nr && size_bytes; i++) {
        struct iovec part = part_behind(&iov[i], &offset, size_bytes);
        if (part.iov_len)
            ret[nr_parts++] = part;
        size_bytes -= part.iov_len;
    }
    return nr_parts;
}
