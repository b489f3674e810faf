// Bytes over a socket, with a timeout and a way out of every wait. Shared by link.c and stream.c.
#ifndef KMIG_LINK_H
#define KMIG_LINK_H

#include <sys/uio.h>

#include "core.h"

struct kmig_link {
    int fd;                            // blocking or not
    int abort_fd;                      // an eventfd: readable means -ECANCELED; -1 for none
    int64_t timeout_ms;                // how long the peer may take or give nothing before -ETIMEDOUT
    struct kmig_zerocopy *zerocopy;    // of fd, or NULL where nothing goes by MSG_ZEROCOPY
    struct kmig_splice *splice;        // of fd, or NULL where nothing goes through a pipe
    uint64_t until_ns;                 // when all must be there that is to be received, or 0
    uint64_t spin_until_ns;            // until when to look again and again instead of to sleep
};

// Send all of the pieces, which are used up. flags: MSG_MORE when more follows at once; MSG_ZEROCOPY to send from where
// the bytes lie, as far as the kernel does (link->splice or link->zerocopy must be there).
int kmig_link_send(const struct kmig_link *link, struct iovec *iov, size_t nr_iov, int flags);

// Fill all of the pieces, which are used up. -ECONNRESET when the peer closes before.
int kmig_link_recv(const struct kmig_link *link, struct iovec *iov, size_t nr_iov);

// Have some of the pieces leave through the pipe, which is open. Returns how many bytes went, or -errno; the pieces must
// be the rest of what they were in the call before.
ssize_t kmig_splice_send(struct kmig_splice *splice, int fd, const struct iovec *iov, size_t nr_iov);

#endif
