// Pages that leave from where they lie, without a copy in between: MSG_ZEROCOPY (Linux 4.14,
// Documentation/networking/msg_zerocopy.rst). What that means for a guest that goes on writing stands in zerocopy.c.

// So many sends may be under way by reference on one connection; what is beyond goes by copy.
#define KMIG_ZEROCOPY_SENDS 128
// Fewer pages in a frame cost more to account for than to copy.
#define KMIG_ZEROCOPY_PAGES 4

// Of one connection. Written by who sends there; others may read.
struct kmig_zerocopy {
    uint64_t sends;            // that went by reference
    uint64_t reported;         // of these, those of which the kernel has said that it holds their pages no more
    uint64_t copied;           // of these, those that it had copied all the same
    uint64_t refused;          // sends that went by copy: too many under way, or no more memory may be locked
};

// Let fd send by reference. -ENOPROTOOPT: not this kernel; -EOPNOTSUPP: not this kind of socket.
int kmig_zerocopy_enable(int fd);

// Take in what the kernel has to report of the sends of fd, without waiting. Until it is taken in, poll says POLLERR.
// Returns of how many sends it told.
long kmig_zerocopy_reap(struct kmig_zerocopy *zerocopy, int fd);
