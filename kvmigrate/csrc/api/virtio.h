// Virtio devices (virtio 1.2): the queues in guest memory, the interrupt, and the thread that serves a device.

#define KMIG_VIRTIO_MAX_QUEUES 4
#define KMIG_VIRTQ_MAX_SIZE 256

// Bits of InterruptStatus (4.2.2).
#define KMIG_VIRTIO_ISR_USED 1
#define KMIG_VIRTIO_ISR_CONFIG 2

// One split queue (2.7). The first group is set while the device is parked, then kmig_virtio_enable is called; with the
// indices it is all the state that a queue has beside what lies in guest memory.
struct kmig_virtq {
    uint64_t desc;             // gpa of each part
    uint64_t avail;
    uint64_t used;
    uint16_t size;
    uint16_t ready;            // set by kmig_virtio_enable
    uint16_t last_avail;       // index of the next entry of the available ring to take
    uint16_t used_idx;         // index of the next entry of the used ring to fill

    uint16_t signalled;        // used_idx when the driver was last interrupted; the event index compares with it
    uint16_t signalled_valid;
    void *desc_at;             // the same parts here
    void *avail_at;
    void *used_at;
};

struct kmig_virtio_thread;

struct kmig_virtio {
    struct kmig_memory *memory;
    struct kmig_virtio_thread *thread;
    uint64_t features;         // as negotiated
    uint32_t nr_queues;
    uint32_t isr;              // KMIG_VIRTIO_ISR_…, changed atomically; kmig_virtio_ack takes bits away
    uint32_t broken;           // the driver broke the rules: nothing is served until kmig_virtio_reset
    int failed;                // the errno that ended the device's thread: broken for good
    int irq_fd;                // an eventfd, written to for each interrupt; the device's own
    int kick_fd[KMIG_VIRTIO_MAX_QUEUES];   // eventfds that a write to QueueNotify signals; the device's own
    struct kmig_virtq queue[KMIG_VIRTIO_MAX_QUEUES];
};

// A device without a thread yet, paused, its eventfds made. memory must outlive it.
int kmig_virtio_create(struct kmig_memory *memory, uint32_t nr_queues, struct kmig_virtio **ret);
void kmig_virtio_destroy(struct kmig_virtio *device);

// Of a parked device: check the ring of queue `index` (size, alignment, all of it RAM) and set it ready; -EINVAL, -EFAULT.
int kmig_virtio_enable(struct kmig_virtio *device, uint32_t index);

// Of a parked device: every queue, feature and interrupt bit back to nothing.
void kmig_virtio_reset(struct kmig_virtio *device);

// Raise KMIG_VIRTIO_ISR_… bits: set them, then signal irq_fd.
void kmig_virtio_interrupt(struct kmig_virtio *device, uint32_t bits);

// The driver broke the rules: mark the device broken, with a configuration interrupt (2.1.2).
void kmig_virtio_break(struct kmig_virtio *device);

// InterruptACK.
void kmig_virtio_ack(struct kmig_virtio *device, uint32_t bits);

// A kick by hand, for a guest that has no ioeventfd; another index is ignored.
void kmig_virtio_kick(struct kmig_virtio *device, uint32_t index);

// Pause: when this returns, the thread has finished the request that it had in hand, taken no other, and parked; nothing
// writes guest memory or a back-end any more. Without a thread it returns at once. Idempotent.
void kmig_virtio_pause(struct kmig_virtio *device);

// Go on, look at every queue once, whether it was kicked or not, and raise again the interrupts that are not acknowledged:
// a kick, or an interrupt on its way through the kernel, does not move with a guest. Idempotent.
void kmig_virtio_resume(struct kmig_virtio *device);

// Let the thread's serve function return, whether it runs or is parked.
void kmig_virtio_quit(struct kmig_virtio *device);

// What lies behind a block device. A thread of its own may change nothing of it while the device is not parked.
struct kmig_virtio_blk {
    int fd;
    int read_only;
    int can_discard;           // fallocate with FALLOC_FL_PUNCH_HOLE works on fd
    int host_error;            // errno of the last request that failed by the image; ENODATA: that is shorter than it was
    uint64_t nr_sectors;       // of 512 bytes; beyond is IOERR
    char id[20];               // GET_ID (5.2.6): not terminated when it is full
    uint64_t nr_requests;      // counters, for who looks
    uint64_t nr_errors;
};

// The bodies of a device's thread. They return 0 after kmig_virtio_quit, or -errno. That of a disk returns 1 when host_error
// has another value than before, for the caller to tell of it and to call again.
int kmig_virtio_blk_serve(struct kmig_virtio *device, struct kmig_virtio_blk *disk);
int kmig_virtio_rng_serve(struct kmig_virtio *device);
