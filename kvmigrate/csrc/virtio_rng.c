// The entropy device (virtio 1.2, 5.4): the thread that fills the driver's buffers.
#include <sys/random.h>

#include "virtq.h"

// No pause waits longer than for this much.
#define MAX_BYTES 65536

static uint32_t fill_random(const struct kmig_chain *chain)
{
    uint8_t bytes[256];
    uint64_t want = chain->in_bytes < MAX_BYTES ? chain->in_bytes : MAX_BYTES;
    uint64_t done = 0;

    while (done < want) {
        size_t part = want - done < sizeof(bytes) ? want - done : sizeof(bytes);
        // Up to 256 bytes come whole or not at all (getrandom(2)).
        if (getrandom(bytes, part, 0) != (ssize_t)part)
            break;
        kmig_iov_write(chain->iov + chain->nr_out, chain->nr_in, done, bytes, part);
        done += part;
    }
    return (uint32_t)done;
}

int kmig_virtio_rng_serve(struct kmig_virtio *device)
{
    struct kmig_chain chain;
    uint32_t queues;
    int rc;

    while ((rc = kmig_virtio_wait(device, NULL, 0, &queues)) > 0)
        while (!kmig_virtio_wanted(device) && kmig_virtq_pop(device, 0, &chain) > 0) {
            kmig_virtq_push(device, 0, &chain, fill_random(&chain));
            kmig_virtq_notify(device, 0);
        }
    return rc;
}
