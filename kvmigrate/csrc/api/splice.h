// Pages that leave from where they lie to a peer on this host: by way of a pipe (vmsplice(2) and splice(2)). There the
// kernel copies what goes by MSG_ZEROCOPY, but hands on what comes out of a pipe: the peer copies it out of guest memory.

// The pipe of one connection. Used by who sends there.
struct kmig_splice {
    int fd[2];                 // its ends, to read and to write; -1 when pages go by copy
    uint64_t held_bytes;       // that are in it: the first ones of what is to be sent next
    uint64_t sent_bytes;       // that went through it so far; others may read
};

// Make the pipe for the connection fd, which does not block from now on: splice waits for a blocking socket whatever its
// flags say. -EMFILE, -ENFILE.
int kmig_splice_open(struct kmig_splice *splice, int fd);

// Pages go by copy from now on. What is in the pipe is given up. Idempotent.
void kmig_splice_close(struct kmig_splice *splice);
