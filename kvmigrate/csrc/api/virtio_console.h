// A console (virtio 1.2, 5.3) of one port. Its bytes pass through two bounded buffers, one for each direction and numbered
// as the queues are: the device's thread is at the guest's end of both, who serves a back-end at the other.

#define KMIG_CONSOLE_RX 0
#define KMIG_CONSOLE_TX 1
#define KMIG_CONSOLE_NR_QUEUES 2

// How much a buffer holds: input that no driver has made room for, output that the back-end has not taken.
#define KMIG_CONSOLE_RX_BYTES 4096
#define KMIG_CONSOLE_TX_BYTES 65536

struct kmig_console_buffers;

struct kmig_virtio_console {
    struct kmig_console_buffers *buffers;
    int wake_fd;               // an eventfd: a buffer has become worth a look at the back-end's end; -1: output goes nowhere
    int timer_fd;              // when a back-end that takes nothing has had its time
    uint32_t nr_passed;        // bytes of the first request of the transmit queue that are in the buffer, or gone, already
    uint32_t waiting;          // set while that request waits for room
    uint32_t stall_ms;         // how long one waits when the back-end takes nothing
    uint64_t nr_dropped;       // bytes of output that did not get any in that time
};

// stall_ms, which is not 0, as above. wake_fd, which may be -1, stays its owner's; the timer is the device's own.
int kmig_virtio_console_create(int wake_fd, uint32_t stall_ms, struct kmig_virtio_console **ret);
void kmig_virtio_console_destroy(struct kmig_virtio_console *console);

// The body of the device's thread. Returns 0 after kmig_virtio_quit, or -errno.
int kmig_virtio_console_serve(struct kmig_virtio *device, struct kmig_virtio_console *console);

// Bytes in buffer `at` (KMIG_CONSOLE_RX or KMIG_CONSOLE_TX), and how many more it takes.
uint32_t kmig_virtio_console_held(struct kmig_virtio_console *console, uint32_t at);
uint32_t kmig_virtio_console_room(struct kmig_virtio_console *console, uint32_t at);

// Add bytes to buffer `at`, at most what it has room for; copy the oldest out; forget the oldest. How many they were. Who
// adds input or forgets output kicks that queue afterwards, since the device's thread may be waiting for it.
uint32_t kmig_virtio_console_add(struct kmig_virtio_console *console, uint32_t at, const uint8_t *data, uint32_t size);
uint32_t kmig_virtio_console_copy(struct kmig_virtio_console *console, uint32_t at, uint8_t *data, uint32_t size);
uint32_t kmig_virtio_console_forget(struct kmig_virtio_console *console, uint32_t at, uint32_t size);
