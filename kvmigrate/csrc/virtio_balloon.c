// The thread of a balloon (virtio 1.2, 5.5). What the guest does without is given back to the host at once and reads as
// zeros from then on: it takes no memory here, and a migration or a snapshot finds nothing there to copy.
#include <endian.h>
#include <sys/mman.h>

#include "bits.h"
#include "internal.h"
#include "virtq.h"

// The pages of 4 GiB. A larger request would only keep a pause waiting, and no driver makes one.
#define MAX_NUMBERS (1 << 20)
#define NUMBERS_AT_ONCE 256

// Part of a slot that lies in a file comes from there again when it is dropped: put empty memory in its place.
static bool drop(struct kmig_slot *slot, uint64_t page, uint64_t nr_pages)
{
    uint8_t *at = slot->hva + page * KMIG_PAGE_BYTES;
    uint64_t size_bytes = nr_pages * KMIG_PAGE_BYTES, end = page + nr_pages;

    if (kmig_bits_next(slot->backed, page, end) == end)
        return madvise(at, size_bytes, MADV_DONTNEED) == 0;
    if (mmap(at, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) ==
        MAP_FAILED)
        return false;
    madvise(at, size_bytes, MADV_DONTDUMP);
    for (uint64_t word = page / 64; word < kmig_bits_words(end); word++)
        __atomic_fetch_and(&slot->backed[word], ~kmig_bits_mask(word, page, end), __ATOMIC_RELAXED);
    return true;
}

// Give pages back to the host. Where the kernel does not take them (its limit of mappings is reached) they stay as they
// are, which the guest does not mind.
static uint64_t give_back(struct kmig_slot *slot, uint64_t page, uint64_t nr_pages)
{
    if (!nr_pages || !drop(slot, page, nr_pages))
        return 0;
    // After they are empty: who copied them before copies them again, as zeros.
    kmig_host_wrote(slot, page, page + nr_pages);
    return nr_pages;
}

// The whole pages of a buffer, which lies in one slot.
static uint64_t give_back_buffer(const struct kmig_memory *memory, const struct iovec *iov)
{
    for (uint32_t i = 0; i < memory->nr_slots; i++) {
        const struct kmig_slot *slot = &memory->slot[i];
        uint64_t offset = (uint64_t)((const uint8_t *)iov->iov_base - slot->hva);
        if ((const uint8_t *)iov->iov_base < slot->hva || offset >= slot->nr_pages * KMIG_PAGE_BYTES)
            continue;
        uint64_t first = (offset + KMIG_PAGE_BYTES - 1) / KMIG_PAGE_BYTES;
        uint64_t end = (offset + iov->iov_len) / KMIG_PAGE_BYTES;
        return give_back((struct kmig_slot *)slot, first, end > first ? end - first : 0);
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
            kmig_count(&balloon->nr_inflated, give_back(slot, gfn - slot->base_gfn, 1));
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
