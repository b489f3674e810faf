// Pages through a pipe to a peer on this host, without a copy on the way.
//
// That a page may change until the peer has copied it is dealt with as for MSG_ZEROCOPY, see zerocopy.c: the pipe and the
// socket hold references to the guest's own pages. No report says when they are let go of, and none is needed.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include "internal.h"
#include "link.h"

#define PIPE_BYTES (1 << 20)

int kmig_splice_open(struct kmig_splice *splice, int fd)
{
    *splice = (struct kmig_splice){.fd = {-1, -1}};
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 || pipe2(splice->fd, O_CLOEXEC | O_NONBLOCK) < 0)
        return -errno;
    // What a user's pipes may hold together is limited. A shorter pipe takes more calls.
    (void)fcntl(splice->fd[1], F_SETPIPE_SZ, PIPE_BYTES);
    return 0;
}

void kmig_splice_close(struct kmig_splice *splice)
{
    for (int i = 0; i < 2; i++) {
        if (splice->fd[i] >= 0)
            close(splice->fd[i]);
        splice->fd[i] = -1;
    }
    splice->held_bytes = 0;
}

// A socket that the peer has closed sends a signal to who splices into it, and there is no MSG_NOSIGNAL for that.
static ssize_t splice_quietly(int from, int to, size_t size_bytes)
{
    const struct timespec now = {0, 0};
    sigset_t pipe_signal, before;

    sigemptyset(&pipe_signal);
    sigaddset(&pipe_signal, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe_signal, &before);
    ssize_t moved = splice(from, NULL, to, NULL, size_bytes, SPLICE_F_NONBLOCK);
    int error = errno;
    if (moved < 0 && error == EPIPE && !sigismember(&before, SIGPIPE))
        sigtimedwait(&pipe_signal, NULL, &now);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return moved < 0 ? -error : moved;
}

ssize_t kmig_splice_send(struct kmig_splice *splice, int fd, const struct iovec *iov, size_t nr_iov)
{
    if (!splice->held_bytes) {
        ssize_t taken = vmsplice(splice->fd[1], iov, nr_iov, SPLICE_F_NONBLOCK);
        if (taken <= 0)
            return taken < 0 ? -errno : -EINVAL;
        splice->held_bytes = (uint64_t)taken;
    }
    ssize_t moved = splice_quietly(splice->fd[0], fd, splice->held_bytes);
    if (moved <= 0)
        return moved < 0 ? moved : -EINVAL;
    splice->held_bytes -= (uint64_t)moved;
    kmig_count(&splice->sent_bytes, (uint64_t)moved);
    return moved;
}
