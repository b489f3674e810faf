// A balloon (virtio 1.2, 5.5): memory that the guest gives up, by number, or of which it only says that it is free.

#define KMIG_BALLOON_INFLATE 0
#define KMIG_BALLOON_DEFLATE 1
#define KMIG_BALLOON_REPORT 2
#define KMIG_BALLOON_NR_QUEUES 3

struct kmig_virtio_balloon {
    uint64_t nr_inflated;      // pages given up so far
    uint64_t nr_reported;      // pages reported free so far
};

// The body of the device's thread. Returns 0 after kmig_virtio_quit, or -errno.
int kmig_virtio_balloon_serve(struct kmig_virtio *device, struct kmig_virtio_balloon *balloon);
