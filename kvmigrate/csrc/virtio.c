// A virtio device: its eventfds, its interrupt, and how its thread waits, parks and goes.
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "virtq.h"

#define MAX_EXTRA 4

struct kmig_virtio_thread {
    pthread_mutex_t lock;    // guards everything below
    pthread_cond_t stopped;  // parked, or gone
    pthread_cond_t changed;  // paused or quit changed
    int wake_fd;             // readable while paused or quit is wanted, to end a poll
    bool paused;
    bool quit;
    bool here;               // a thread is inside a serve function
    bool parked;
    bool look;               // look at every queue, kicked or not
    uint32_t wanted;         // paused or quit, for kmig_virtio_wanted without the lock
};

// A full counter means that the reader has something to read already; nothing else can fail here.
static void signal_fd(int fd)
{
    uint64_t one = 1;
    while (write(fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

static bool drain_fd(int fd)
{
    uint64_t count;
    ssize_t got;
    do
        got = read(fd, &count, sizeof(count));
    while (got < 0 && errno == EINTR);
    return got == sizeof(count);
}

static int open_fds(struct kmig_virtio *device)
{
    device->irq_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    device->thread->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (device->irq_fd < 0 || device->thread->wake_fd < 0)
        return -errno;
    for (uint32_t i = 0; i < device->nr_queues; i++) {
        device->kick_fd[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (device->kick_fd[i] < 0)
            return -errno;
    }
    return 0;
}

int kmig_virtio_create(struct kmig_memory *memory, uint32_t nr_queues, struct kmig_virtio **ret)
{
    if (!nr_queues || nr_queues > KMIG_VIRTIO_MAX_QUEUES)
        return -EINVAL;
    struct kmig_virtio *device = calloc(1, sizeof(*device));
    struct kmig_virtio_thread *thread = calloc(1, sizeof(*thread));
    if (!device || !thread) {
        free(device);
        free(thread);
        return -ENOMEM;
    }
    *device = (struct kmig_virtio){.memory = memory, .thread = thread, .nr_queues = nr_queues, .irq_fd = -1};
    for (uint32_t i = 0; i < KMIG_VIRTIO_MAX_QUEUES; i++)
        device->kick_fd[i] = -1;
    pthread_mutex_init(&thread->lock, NULL);
    pthread_cond_init(&thread->stopped, NULL);
    pthread_cond_init(&thread->changed, NULL);
    thread->paused = true;
    thread->wanted = 1;
    thread->wake_fd = -1;
    int rc = open_fds(device);
    if (rc < 0) {
        kmig_virtio_destroy(device);
        return rc;
    }
    *ret = device;
    return 0;
}

void kmig_virtio_destroy(struct kmig_virtio *device)
{
    if (!device)
        return;
    for (uint32_t i = 0; i < device->nr_queues; i++)
        if (device->kick_fd[i] >= 0)
            close(device->kick_fd[i]);
    if (device->irq_fd >= 0)
        close(device->irq_fd);
    if (device->thread->wake_fd >= 0)
        close(device->thread->wake_fd);
    pthread_cond_destroy(&device->thread->stopped);
    pthread_cond_destroy(&device->thread->changed);
    pthread_mutex_destroy(&device->thread->lock);
    free(device->thread);
    free(device);
}

void kmig_virtio_reset(struct kmig_virtio *device)
{
    memset(device->queue, 0, sizeof(device->queue));
    device->features = 0;
    __atomic_store_n(&device->isr, 0, __ATOMIC_SEQ_CST);
    // A device whose thread is gone is no better after a reset.
    __atomic_store_n(&device->broken, device->failed != 0, __ATOMIC_SEQ_CST);
}

void kmig_virtio_interrupt(struct kmig_virtio *device, uint32_t bits)
{
    // The bits first: the driver reads them in the handler of the interrupt.
    __atomic_fetch_or(&device->isr, bits, __ATOMIC_SEQ_CST);
    signal_fd(device->irq_fd);
}

void kmig_virtio_ack(struct kmig_virtio *device, uint32_t bits)
{
    __atomic_fetch_and(&device->isr, ~bits, __ATOMIC_SEQ_CST);
}

void kmig_virtio_break(struct kmig_virtio *device)
{
    __atomic_store_n(&device->broken, 1, __ATOMIC_SEQ_CST);
    kmig_virtio_interrupt(device, KMIG_VIRTIO_ISR_CONFIG);
}

void kmig_virtio_kick(struct kmig_virtio *device, uint32_t index)
{
    if (index < device->nr_queues)
        signal_fd(device->kick_fd[index]);
}

// Under the lock: tell the thread what is wanted of it now.
static void announce(struct kmig_virtio_thread *thread)
{
    bool wanted = thread->paused || thread->quit;

    __atomic_store_n(&thread->wanted, wanted, __ATOMIC_RELEASE);
    if (wanted)
        signal_fd(thread->wake_fd);
    else
        drain_fd(thread->wake_fd);
    pthread_cond_broadcast(&thread->changed);
}

void kmig_virtio_pause(struct kmig_virtio *device)
{
    struct kmig_virtio_thread *thread = device->thread;

    pthread_mutex_lock(&thread->lock);
    thread->paused = true;
    announce(thread);
    while (thread->here && !thread->parked)
        pthread_cond_wait(&thread->stopped, &thread->lock);
    pthread_mutex_unlock(&thread->lock);
}

void kmig_virtio_resume(struct kmig_virtio *device)
{
    struct kmig_virtio_thread *thread = device->thread;

    pthread_mutex_lock(&thread->lock);
    thread->paused = false;
    thread->look = true;
    announce(thread);
    // Even a thread that was not parked looks: it may be in a poll that nothing else would end.
    signal_fd(device->kick_fd[0]);
    pthread_mutex_unlock(&thread->lock);
    if (__atomic_load_n(&device->isr, __ATOMIC_SEQ_CST))
        signal_fd(device->irq_fd);
}

void kmig_virtio_quit(struct kmig_virtio *device)
{
    struct kmig_virtio_thread *thread = device->thread;

    pthread_mutex_lock(&thread->lock);
    thread->quit = true;
    announce(thread);
    pthread_mutex_unlock(&thread->lock);
}

bool kmig_virtio_wanted(const struct kmig_virtio *device)
{
    return __atomic_load_n(&device->thread->wanted, __ATOMIC_ACQUIRE);
}

// Park while paused. Returns whether the thread may go on; *ret_look says whether every queue must be looked at.
static bool park(struct kmig_virtio_thread *thread, bool *ret_look)
{
    pthread_mutex_lock(&thread->lock);
    thread->here = true;
    while (thread->paused && !thread->quit) {
        thread->parked = true;
        pthread_cond_broadcast(&thread->stopped);
        pthread_cond_wait(&thread->changed, &thread->lock);
    }
    thread->parked = false;
    *ret_look = thread->look;
    thread->look = false;
    bool goes_on = !thread->quit;
    if (!goes_on) {
        thread->here = false;
        pthread_cond_broadcast(&thread->stopped);
    }
    pthread_mutex_unlock(&thread->lock);
    return goes_on;
}

int kmig_virtio_fail(struct kmig_virtio *device, int rc)
{
    struct kmig_virtio_thread *thread = device->thread;

    // First: once nobody waits for the thread any more, what it left may be saved.
    device->failed = -rc;
    kmig_virtio_break(device);
    pthread_mutex_lock(&thread->lock);
    thread->here = false;
    pthread_cond_broadcast(&thread->stopped);
    pthread_mutex_unlock(&thread->lock);
    return rc;
}

// One poll; returns whether anything is ready, with the kicks taken, or -errno.
static int poll_once(struct kmig_virtio *device, struct pollfd *extra, uint32_t nr_extra, uint32_t *ret_queues)
{
    struct pollfd fds[1 + KMIG_VIRTIO_MAX_QUEUES + MAX_EXTRA] = {{device->thread->wake_fd, POLLIN, 0}};
    uint32_t nr = 1 + device->nr_queues;
    bool ready = false;

    for (uint32_t i = 0; i < device->nr_queues; i++)
        fds[1 + i] = (struct pollfd){device->kick_fd[i], POLLIN, 0};
    for (uint32_t i = 0; i < nr_extra; i++)
        fds[nr + i] = extra[i];
    if (poll(fds, nr + nr_extra, -1) < 0)
        return errno == EINTR ? 0 : -errno;
    for (uint32_t i = 0; i < device->nr_queues; i++)
        if (fds[1 + i].revents && drain_fd(device->kick_fd[i]))
            *ret_queues |= UINT32_C(1) << i;
    for (uint32_t i = 0; i < nr_extra; i++) {
        extra[i].revents = fds[nr + i].revents;
        ready |= extra[i].revents != 0;
    }
    return ready || *ret_queues;
}

int kmig_virtio_wait(struct kmig_virtio *device, struct pollfd *extra, uint32_t nr_extra, uint32_t *ret_queues)
{
    int rc = nr_extra > MAX_EXTRA ? -EINVAL : 0;
    bool look;

    *ret_queues = 0;
    for (uint32_t i = 0; i < nr_extra && !rc; i++)
        extra[i].revents = 0;
    while (rc == 0) {
        if (!park(device->thread, &look))
            return 0;
        if (look) {
            *ret_queues = (UINT32_C(1) << device->nr_queues) - 1;
            return 1;
        }
        rc = poll_once(device, extra, nr_extra, ret_queues);
    }
    return rc < 0 ? kmig_virtio_fail(device, rc) : 1;
}
