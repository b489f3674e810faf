// The thread of a balloon (virtio 1.2, 5.5). What the guest does without is given back to the host at once and reads as
// zeros from then on: it takes no memory here (but for huge pages that were set aside for the guest), and a migration or a
// snapshot finds nothing there to copy.
#include <endian.h>

#include "bits.h"
#include "internal.h"
#include "virtq.h"

// The pages of 4 GiB. A larger request would only keep a pause waiting, and no driver makes one.
#define MAX_NUMBERS (1 << 20)
#define NUMBERS_AT_ONCE 256

// Give pages back to the host. Where the kernel does not take them (its limit of mappings is reached) they stay as they
// are, which the guest does not mind.
static uint64_t give_back(struct kmig_memory *memory, struct kmig_slot *slot, uint64_t page, uint64_t nr_pages)
{
    if (!nr_pages || kmig_backend_empty(memory, slot, page, page + nr_pages) < 0)
        return 0;
    // After they are empty: who copied them before copies them again, as zeros.
    kmig_host_wrote(slot, page, page + nr_pages);
    return nr_pages;
}

// The whole pages of a buffer, which lies in one slot.
static uint64_t give_back_buffer(struct kmig_memory *memory, const struct iovec *iov)
{
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        struct kmig_slot *slot = &memory->slot[i];
        uint64_t offset = (uint64_t)((const uint8_t *)iov->iov_base - slot->hva);
        if ((const uint8_t *)iov->iov_base < slot->hva || offset >= slot->nr_pages * KMIG_PAGE_BYTES)
            continue;
        uint64_t first = (offset + KMIG_PAGE_BYTES - 1) / KMIG_PAGE_BYTES;
        uint64_t end = (offset + iov->iov_len) / KMIG_PAGE_BYTES;
        return give_back(memory, slot, first, end > first ? end - first : 0);
    }
    return 0;
}

// One request to inflate: numbers of pages. False when it breaks the rules.
static bool inflate(struct kmig_virtio *device, struct kmig_virtio_balloon *balloon, const struct kmig_chain *chain)
{
    uint32_t numbers[NUMBERS_AT_ONCE];

    if (chain->out_bytes % sizeof(*numbers) || chain->out_bytes > MAX_NUMBERS * sizeof(*numbers))
        return false;
    for (uint64_t done = 0; done < chain->out_bytes; done += sizeof(numbers)) {
        uint64_t got = kmig_iov_read(chain->iov, chain->nr_out, done, numbers, sizeof(numbers)) / sizeof(*numbers);
        for (uint64_t i = 0; i < got; i++) {
            uint64_t gfn = le32toh(numbers[i]);
            struct kmig_slot *slot = kmig_memory_slot(device->memory, gfn);
            if (!slot)
                return false;
            kmig_count(&balloon->nr_inflated, give_back(device->memory, slot, gfn - slot->base_gfn, 1));
        }
    }
    return true;
}

static void report(struct kmig_virtio *device, struct kmig_virtio_balloon *balloon, const struct kmig_chain *chain)
{
    for (uint32_t i = 0; i < chain->nr_in; i++)
        kmig_count(&balloon->nr_reported, give_back_buffer(device->memory, &chain->iov[chain->nr_out + i]));
}

static void serve_queue(struct kmig_virtio *device, struct kmig_virtio_balloon *balloon, uint32_t index,
                        struct kmig_chain *chain)
{
    while (!kmig_virtio_wanted(device) && kmig_virtq_pop(device, index, chain) > 0) {
        if (index == KMIG_BALLOON_INFLATE && !inflate(device, balloon, chain)) {
            kmig_virtio_break(device);
            return;
        }
        // To deflate needs nothing: a page comes back when it is touched.
        if (index == KMIG_BALLOON_REPORT)
            report(device, balloon, chain);
        kmig_virtq_push(device, index, chain, 0);
        kmig_virtq_notify(device, index);
    }
}

int kmig_virtio_balloon_serve(struct kmig_virtio *device, struct kmig_virtio_balloon *balloon)
{
    struct kmig_chain chain;
    uint32_t queues;
    int rc;

    while ((rc = kmig_virtio_wait(device, NULL, 0, &queues)) > 0)
        for (uint32_t index = 0; index < KMIG_BALLOON_NR_QUEUES; index++)
            if (queues >> index & 1)
                serve_queue(device, balloon, index, &chain);
    return rc;
}
