// Sends by reference, and what the kernel reports of them.
//
// The guest may write to a page after it was hashed and before it leaves, which may be as late as its last retransmission:
// then the other side holds, and has hashed, other bytes than were hashed here. That is the same as a page that tears while
// sendmsg copies it, and is mended the same way. The log was cleared before the page was looked at, so the write is in the
// log and the page goes again, whatever it holds by then: nothing may ever leave a page out because its hash is the one
// that was sent before. (A page that is skipped as zero was never sent as data since.) The later version cannot be
// overtaken by the earlier one: on one connection TCP keeps the order, and a round begins on any only when all of the one
// before has arrived on all. In the last round nobody writes, and both sides' digests are compared after it.
//
// So nothing has to wait for a report. A round counts as delivered when the destination says so, which is more than a
// report says: the kernel reports when it lets go of the pages, and what it copied may not even have left. Memory may be
// given back or unmapped with sends under way: the kernel holds the pages themselves, with the bytes that were in them,
// and the balloon marks what it gave back as written. Reports are taken in so that poll does not go on saying POLLERR, that
// what may be locked is not used up, and to tell the user what came of it.
//
// What is reused for something else before it has left must not go this way: heads of frames, compressed pages, and pages
// in the bounce buffer. And nothing is known of what the other side holds, so that such a page is no base for a delta.
#include <netinet/in.h>
#include <sys/socket.h>
#include <time.h>
// Needs the above.
#include <linux/errqueue.h>

#include "internal.h"

int kmig_zerocopy_enable(int fd)
{
    const int on = 1;

    return setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)) < 0 ? -errno : 0;
}

// The range of sends that a message of the error queue reports, or NULL when it is of something else.
static const struct sock_extended_err *find_report(struct msghdr *message)
{
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(message); cmsg; cmsg = CMSG_NXTHDR(message, cmsg)) {
        bool ip = cmsg->cmsg_level == SOL_IP && cmsg->cmsg_type == IP_RECVERR;
        bool ipv6 = cmsg->cmsg_level == SOL_IPV6 && cmsg->cmsg_type == IPV6_RECVERR;
        const struct sock_extended_err *error = (const struct sock_extended_err *)CMSG_DATA(cmsg);
        if ((ip || ipv6) && error->ee_errno == 0 && error->ee_origin == SO_EE_ORIGIN_ZEROCOPY)
            return error;
    }
    return NULL;
}

long kmig_zerocopy_reap(struct kmig_zerocopy *zerocopy, int fd)
{
    uint64_t before = zerocopy->reported;

    while (zerocopy->reported < zerocopy->sends) {
        char control[CMSG_SPACE(sizeof(struct sock_extended_err) + sizeof(struct sockaddr_in6))]
            __attribute__((aligned(sizeof(size_t))));
        struct msghdr message = {.msg_control = control, .msg_controllen = sizeof(control)};
        if (recvmsg(fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) {
            if (errno == EAGAIN)
                break;
            if (errno == EINTR)
                continue;
            return -errno;
        }
        const struct sock_extended_err *report = find_report(&message);
        if (!report)
            continue;
        // The kernel counts in 32 bits. It joins neighbouring reports, and says of all what it said of the first one.
        uint64_t nr_sends = (uint64_t)(uint32_t)(report->ee_data - report->ee_info) + 1;
        kmig_count(&zerocopy->reported, nr_sends);
        if (report->ee_code & SO_EE_CODE_ZEROCOPY_COPIED)
            kmig_count(&zerocopy->copied, nr_sends);
    }
    return (long)(zerocopy->reported - before);
}
