// Bytes over a socket: sent and received as a whole, or an error that says why not.
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>

#include "internal.h"
#include "link.h"

#define SMALL_BYTES (64 << 10)
#define LOW_WATER_BYTES (512 << 10)
#define SLOW_YIELD_NS 100000
#define CROWDED_NS 50000000

// Whether fd is ready for events before spin_until_ns. To wake a sleeper takes the kernel longer than a frame of the
// blackout is away; but the one that is to send it may have no other processor than this, so each look gives it up. When
// that takes a while, somebody else needs the processor: then a sleeper gets it back sooner than one that only yields.
static int spin(struct pollfd *poller, const struct kmig_link *link)
{
    static uint64_t crowded_until_ns;
    uint64_t now = kmig_now_ns();
    int rc = 0;

    while (rc == 0 && now < link->spin_until_ns && now >= __atomic_load_n(&crowded_until_ns, __ATOMIC_RELAXED)) {
        rc = poll(poller, 2, 0);
        if (rc)
            break;
        sched_yield();
        uint64_t back = kmig_now_ns();
        if (back - now > SLOW_YIELD_NS)
            __atomic_store_n(&crowded_until_ns, back + CROWDED_NS, __ATOMIC_RELAXED);
        now = back;
    }
    return rc;
}

// Wait until the socket is ready for events, or has something to report, which would otherwise end each wait at once.
static int wait_ready(const struct kmig_link *link, short events)
{
    struct pollfd poller[2] = {{.fd = link->fd, .events = events}, {.fd = link->abort_fd, .events = POLLIN}};
    uint64_t until = kmig_now_ns() + (uint64_t)link->timeout_ms * 1000000;
    long reports = link->zerocopy ? kmig_zerocopy_reap(link->zerocopy, link->fd) : 0;

    if (reports < 0)
        return (int)reports;
    if (link->until_ns && link->until_ns < until)
        until = link->until_ns;
    for (;;) {
        int rc = spin(poller, link);
        uint64_t now = kmig_now_ns();
        uint64_t left = now < until ? until - now : 0;
        struct timespec wait = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
        if (rc == 0)
            rc = ppoll(poller, 2, &wait, NULL);
        if (rc < 0 && errno != EINTR)
            return -errno;
        if (rc > 0 && poller[1].revents)
            return -ECANCELED;
        if (rc > 0)
            return 0;
        if (rc == 0 && !left)
            return -ETIMEDOUT;
    }
}

// Take moved bytes off the front of the list. Returns what is left of it.
static struct iovec *advance(struct iovec *iov, size_t *nr_iov, size_t moved)
{
    while (*nr_iov && moved >= iov->iov_len) {
        moved -= iov->iov_len;
        iov++;
        (*nr_iov)--;
    }
    if (*nr_iov) {
        iov->iov_base = (uint8_t *)iov->iov_base + moved;
        iov->iov_len -= moved;
    }
    return iov;
}

// One sendmsg, by reference if flags say so and it can be. Returns how many bytes went, or -errno.
static ssize_t sendmsg_some(const struct kmig_link *link, struct iovec *iov, size_t nr_iov, int flags)
{
    const struct msghdr message = {.msg_iov = iov, .msg_iovlen = nr_iov};
    struct kmig_zerocopy *zerocopy = flags & MSG_ZEROCOPY ? link->zerocopy : NULL;

    if (zerocopy) {
        long rc = kmig_zerocopy_reap(zerocopy, link->fd);
        if (rc < 0)
            return rc;
        bool may = zerocopy->sends - zerocopy->reported < KMIG_ZEROCOPY_SENDS;
        ssize_t sent = may ? sendmsg(link->fd, &message, flags) : -1;
        if (sent > 0)
            kmig_count(&zerocopy->sends, 1);
        // ENOBUFS: no more may be locked, or be on the error queue. To wait for either would be slower than a copy.
        if (may && (sent >= 0 || errno != ENOBUFS))
            return sent < 0 ? -errno : sent;
    }
    ssize_t sent = sendmsg(link->fd, &message, flags & ~MSG_ZEROCOPY);
    if (zerocopy && sent > 0)
        kmig_count(&zerocopy->refused, 1);
    return sent < 0 ? -errno : sent;
}

// Whether error says that pages cannot go through a pipe here, and nothing of the connection.
static bool cannot_splice(ssize_t error)
{
    return error == -EINVAL || error == -ENOSYS || error == -EOPNOTSUPP || error == -EPERM || error == -EACCES ||
           error == -ENOMEM;
}

// Send some, through the pipe if flags say so and there is one. Returns how many bytes went, or -errno.
static ssize_t send_some(const struct kmig_link *link, struct iovec *iov, size_t nr_iov, int flags)
{
    struct kmig_splice *splice = flags & MSG_ZEROCOPY ? link->splice : NULL;

    if (splice && splice->fd[0] >= 0) {
        ssize_t sent = kmig_splice_send(splice, link->fd, iov, nr_iov);
        if (!cannot_splice(sent))
            return sent;
        kmig_splice_close(splice);
    }
    return sendmsg_some(link, iov, nr_iov, flags);
}

int kmig_link_send(const struct kmig_link *link, struct iovec *iov, size_t nr_iov, int flags)
{
    while (nr_iov) {
        ssize_t sent = send_some(link, iov, nr_iov, flags | MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) {
            iov = advance(iov, &nr_iov, (size_t)sent);
        } else if (sent == -EAGAIN) {
            int rc = wait_ready(link, POLLOUT);
            if (rc)
                return rc;
        } else if (sent != -EINTR) {
            return (int)sent;
        }
    }
    return 0;
}

static size_t bytes_left(const struct iovec *iov, size_t nr_iov)
{
    size_t left = 0;
    for (size_t i = 0; i < nr_iov; i++)
        left += iov[i].iov_len;
    return left;
}

// How many bytes wake a reader (SO_RCVLOWAT); a kind of socket that knows no such thing wakes it for any.
static void set_low_water(int fd, size_t size_bytes, size_t *low_water)
{
    int value = (int)size_bytes;

    if (size_bytes != *low_water)
        setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &value, sizeof(value));
    *low_water = size_bytes;
}

// Wait for a good part of what is left, not for each packet of it: on a busy host every waking costs more than its
// packet. When the time is up, less may have come all the same: a slow peer is not a dead one.
static int wait_for_bytes(const struct kmig_link *link, size_t left, size_t *low_water)
{
    size_t want = left < LOW_WATER_BYTES ? left : LOW_WATER_BYTES;

    set_low_water(link->fd, left > SMALL_BYTES ? want : 1, low_water);
    int rc = wait_ready(link, POLLIN);
    if (rc == -ETIMEDOUT && *low_water > 1) {
        struct pollfd poller = {.fd = link->fd, .events = POLLIN};
        set_low_water(link->fd, 1, low_water);
        if (poll(&poller, 1, 0) > 0)
            return 0;
    }
    return rc;
}

int kmig_link_recv(const struct kmig_link *link, struct iovec *iov, size_t nr_iov)
{
    size_t low_water = 1;
    int rc = 0;

    while (nr_iov && !rc) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = nr_iov};
        ssize_t got = recvmsg(link->fd, &message, MSG_DONTWAIT);
        if (got > 0)
            iov = advance(iov, &nr_iov, (size_t)got);
        else if (got == 0)
            rc = -ECONNRESET;
        else if (errno == EAGAIN)
            rc = wait_for_bytes(link, bytes_left(iov, nr_iov), &low_water);
        else if (errno != EINTR)
            rc = -errno;
    }
    // Whoever reads the socket next may wait for less.
    set_low_water(link->fd, 1, &low_water);
    return rc;
}

int kmig_stream_send(int fd, const void *data, uint64_t size_bytes, int abort_fd, int64_t timeout_ms,
                     struct kmig_zerocopy *zerocopy)
{
    const struct kmig_link link = {.fd = fd, .abort_fd = abort_fd, .timeout_ms = timeout_ms, .zerocopy = zerocopy};
    struct iovec iov = {(void *)data, size_bytes};

    if (kmig_aborted(abort_fd))
        return -ECANCELED;
    return size_bytes ? kmig_link_send(&link, &iov, 1, 0) : 0;
}

int kmig_stream_recv(int fd, void *data, uint64_t size_bytes, int abort_fd, int64_t timeout_ms, uint64_t spin_us,
                     struct kmig_zerocopy *zerocopy)
{
    uint64_t now = kmig_now_ns();
    const struct kmig_link link = {.fd = fd,
                                   .abort_fd = abort_fd,
                                   .timeout_ms = timeout_ms,
                                   .zerocopy = zerocopy,
                                   .until_ns = now + (uint64_t)timeout_ms * 1000000,
                                   .spin_until_ns = now + spin_us * 1000};
    struct iovec iov = {data, size_bytes};

    if (kmig_aborted(abort_fd))
        return -ECANCELED;
    return size_bytes ? kmig_link_recv(&link, &iov, 1) : 0;
}
