// The thread of a console (virtio 1.2, 5.3), and the two buffers between it and who serves the back-end.
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "internal.h"
#include "virtq.h"

// Requests in a row of one direction, before the other one has its turn and the driver is interrupted.
#define BATCH 64
#define ALL_QUEUES ((UINT32_C(1) << KMIG_CONSOLE_NR_QUEUES) - 1)

struct ring {
    uint8_t *data;
    uint32_t capacity;
    uint32_t first;
    uint32_t held;
};

struct kmig_console_buffers {
    pthread_mutex_t lock;      // guards everything below
    uint64_t nr_taken;         // bytes of output that the back-end has taken since the device was made
    struct ring ring[KMIG_CONSOLE_NR_QUEUES];
    uint8_t rx[KMIG_CONSOLE_RX_BYTES];
    uint8_t tx[KMIG_CONSOLE_TX_BYTES];
};

// What the thread works with.
struct port {
    struct kmig_virtio *device;
    struct kmig_virtio_console *console;
    bool stalled;              // the back-end had its time: output is dropped until it takes some
    uint64_t taken_before;     // nr_taken when the wait for it began
    struct kmig_chain chain;
    struct iovec part[KMIG_VIRTQ_MAX_IOV];
};

static uint32_t smaller(uint64_t left, uint64_t right)
{
    return (uint32_t)(left < right ? left : right);
}

int kmig_virtio_console_create(int wake_fd, uint32_t stall_ms, struct kmig_virtio_console **ret)
{
    struct kmig_virtio_console *console = calloc(1, sizeof(*console));
    struct kmig_console_buffers *buffers = calloc(1, sizeof(*buffers));
    int timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    int rc = timer_fd < 0 ? -errno : 0;
    if (!console || !buffers || rc < 0) {
        if (timer_fd >= 0)
            close(timer_fd);
        free(console);
        free(buffers);
        return rc < 0 ? rc : -ENOMEM;
    }
    pthread_mutex_init(&buffers->lock, NULL);
    buffers->ring[KMIG_CONSOLE_RX] = (struct ring){.data = buffers->rx, .capacity = sizeof(buffers->rx)};
    buffers->ring[KMIG_CONSOLE_TX] = (struct ring){.data = buffers->tx, .capacity = sizeof(buffers->tx)};
    *console = (struct kmig_virtio_console){
        .buffers = buffers, .wake_fd = wake_fd, .timer_fd = timer_fd, .stall_ms = stall_ms};
    *ret = console;
    return 0;
}

void kmig_virtio_console_destroy(struct kmig_virtio_console *console)
{
    if (!console)
        return;
    close(console->timer_fd);
    pthread_mutex_destroy(&console->buffers->lock);
    free(console->buffers);
    free(console);
}

static struct ring *lock_ring(struct kmig_virtio_console *console, uint32_t at)
{
    pthread_mutex_lock(&console->buffers->lock);
    return &console->buffers->ring[at];
}

static void unlock_ring(struct kmig_virtio_console *console)
{
    pthread_mutex_unlock(&console->buffers->lock);
}

uint32_t kmig_virtio_console_held(struct kmig_virtio_console *console, uint32_t at)
{
    uint32_t held = lock_ring(console, at)->held;
    unlock_ring(console);
    return held;
}

uint32_t kmig_virtio_console_room(struct kmig_virtio_console *console, uint32_t at)
{
    struct ring *ring = lock_ring(console, at);
    uint32_t room = ring->capacity - ring->held;
    unlock_ring(console);
    return room;
}

// Who serves the back-end sleeps until there is output, or room for input again. Under the lock: what it last saw of the
// buffer is what we decide by.
static void wake_backend(const struct kmig_virtio_console *console)
{
    // A full counter means that there is something to read already.
    if (console->wake_fd >= 0)
        (void)eventfd_write(console->wake_fd, 1);
}

uint32_t kmig_virtio_console_add(struct kmig_virtio_console *console, uint32_t at, const uint8_t *data, uint32_t size)
{
    struct ring *ring = lock_ring(console, at);
    uint32_t added = smaller(size, ring->capacity - ring->held);
    uint32_t end = (ring->first + ring->held) % ring->capacity;
    uint32_t straight = smaller(added, ring->capacity - end);

    memcpy(ring->data + end, data, straight);
    memcpy(ring->data, data + straight, added - straight);
    if (at == KMIG_CONSOLE_TX && added && !ring->held)
        wake_backend(console);
    ring->held += added;
    unlock_ring(console);
    return added;
}

uint32_t kmig_virtio_console_copy(struct kmig_virtio_console *console, uint32_t at, uint8_t *data, uint32_t size)
{
    struct ring *ring = lock_ring(console, at);
    uint32_t copied = smaller(size, ring->held);
    uint32_t straight = smaller(copied, ring->capacity - ring->first);

    memcpy(data, ring->data + ring->first, straight);
    memcpy(data + straight, ring->data, copied - straight);
    unlock_ring(console);
    return copied;
}

uint32_t kmig_virtio_console_forget(struct kmig_virtio_console *console, uint32_t at, uint32_t size)
{
    struct ring *ring = lock_ring(console, at);
    uint32_t gone = smaller(size, ring->held);

    if (at == KMIG_CONSOLE_RX && gone && ring->held == ring->capacity)
        wake_backend(console);
    if (at == KMIG_CONSOLE_TX)
        console->buffers->nr_taken += gone;
    ring->first = (ring->first + gone) % ring->capacity;
    ring->held -= gone;
    unlock_ring(console);
    return gone;
}

static uint64_t nr_taken(struct kmig_virtio_console *console)
{
    lock_ring(console, KMIG_CONSOLE_TX);
    uint64_t taken = console->buffers->nr_taken;
    unlock_ring(console);
    return taken;
}

static struct iovec *in_iov(struct port *port)
{
    return port->chain.iov + port->chain.nr_out;
}

// Input into one request. How many bytes.
static uint32_t fill(struct port *port)
{
    uint32_t filled = 0;

    for (uint32_t i = 0; i < port->chain.nr_in; i++) {
        const struct iovec *iov = &in_iov(port)[i];
        uint32_t size = smaller(iov->iov_len, KMIG_CONSOLE_RX_BYTES);
        uint32_t copied = kmig_virtio_console_copy(port->console, KMIG_CONSOLE_RX, iov->iov_base, size);
        filled += kmig_virtio_console_forget(port->console, KMIG_CONSOLE_RX, copied);
    }
    return filled;
}

// One request of input. False when there is none, or nothing for it.
static bool receive_one(struct port *port)
{
    if (!kmig_virtio_console_held(port->console, KMIG_CONSOLE_RX) ||
        kmig_virtq_pop(port->device, KMIG_CONSOLE_RX, &port->chain) <= 0)
        return false;
    // Only what the device writes may be in its receive queue (5.3.6.2).
    if (port->chain.nr_out) {
        kmig_virtio_break(port->device);
        return false;
    }
    kmig_virtq_push(port->device, KMIG_CONSOLE_RX, &port->chain, fill(port));
    return true;
}

// Move what is left of a request into the buffer, as far as there is room. How many bytes are still left.
static uint64_t pass(struct port *port)
{
    struct kmig_virtio_console *console = port->console;
    // The guest may have changed a request that is half done.
    uint32_t passed = smaller(console->nr_passed, port->chain.out_bytes);
    uint64_t left = port->chain.out_bytes - passed;
    uint32_t nr = kmig_iov_slice(port->chain.iov, port->chain.nr_out, passed, left, port->part);

    for (uint32_t i = 0; i < nr; i++) {
        uint32_t size = (uint32_t)port->part[i].iov_len;
        uint32_t added = kmig_virtio_console_add(console, KMIG_CONSOLE_TX, port->part[i].iov_base, size);
        left -= added;
        passed += added;
        if (added < size)
            break;
    }
    console->nr_passed = passed;
    return left;
}

static void set_waiting(struct port *port, bool waiting)
{
    __atomic_store_n(&port->console->waiting, waiting, __ATOMIC_RELEASE);
}

// Whether output without room may wait: the back-end takes some now and then. The time runs anew whenever it has.
static bool may_wait(struct port *port)
{
    struct kmig_virtio_console *console = port->console;
    struct itimerspec once = {.it_value = {console->stall_ms / 1000, console->stall_ms % 1000 * 1000000L}};
    uint64_t taken = nr_taken(console);

    if (port->stalled && taken == port->taken_before)
        return false;
    if (port->stalled || !console->waiting || taken != port->taken_before)
        timerfd_settime(console->timer_fd, 0, &once, NULL);
    port->stalled = false;
    port->taken_before = taken;
    set_waiting(port, true);
    return true;
}

// One request of output. False when there is none, or it stays in the queue.
static bool transmit_one(struct port *port)
{
    if (kmig_virtq_pop(port->device, KMIG_CONSOLE_TX, &port->chain) <= 0)
        return false;
    // Only what the device reads may be in its transmit queue (5.3.6.2).
    if (port->chain.nr_in) {
        kmig_virtio_break(port->device);
        return false;
    }
    bool has_backend = port->console->wake_fd >= 0;
    uint64_t left = has_backend ? pass(port) : 0;
    if (left && may_wait(port)) {
        kmig_virtq_unpop(port->device, KMIG_CONSOLE_TX);
        return false;
    }
    kmig_count(&port->console->nr_dropped, left);
    port->console->nr_passed = 0;
    set_waiting(port, false);
    kmig_virtq_push(port->device, KMIG_CONSOLE_TX, &port->chain, 0);
    return true;
}

// True when there may be more.
static bool serve_queue(struct port *port, uint32_t at)
{
    uint32_t nr = 0;

    while (nr < BATCH && !kmig_virtio_wanted(port->device) &&
           (at == KMIG_CONSOLE_RX ? receive_one(port) : transmit_one(port)))
        nr++;
    if (nr)
        kmig_virtq_notify(port->device, at);
    return nr == BATCH;
}

static void look_at_timer(struct port *port)
{
    struct kmig_virtio_console *console = port->console;
    uint64_t nr_expired;

    if (read(console->timer_fd, &nr_expired, sizeof(nr_expired)) == sizeof(nr_expired))
        port->stalled = console->waiting && nr_taken(console) == port->taken_before;
}

static void serve_queues(struct port *port, uint32_t queues)
{
    bool more = true;

    // After a pause, while which nobody could take anything, the time runs anew.
    if (queues == ALL_QUEUES) {
        port->stalled = false;
        set_waiting(port, false);
    } else {
        look_at_timer(port);
    }
    while (more && !kmig_virtio_wanted(port->device)) {
        more = serve_queue(port, KMIG_CONSOLE_TX);
        more |= serve_queue(port, KMIG_CONSOLE_RX);
    }
}

int kmig_virtio_console_serve(struct kmig_virtio *device, struct kmig_virtio_console *console)
{
    struct port port = {.device = device, .console = console};
    struct pollfd timer = {.fd = console->timer_fd, .events = POLLIN};
    uint32_t queues;
    int rc;

    while ((rc = kmig_virtio_wait(device, &timer, 1, &queues)) > 0)
        serve_queues(&port, queues);
    return rc;
}
