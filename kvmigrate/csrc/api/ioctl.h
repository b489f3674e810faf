// ioctl(fd, request, arg) as a result code. Retries EINTR for every request but KVM_RUN, which is not called through here.
int kmig_ioctl(int fd, unsigned long request, void *arg);

// The same for requests whose argument is a number.
int kmig_ioctl_value(int fd, unsigned long request, unsigned long arg);

// One of several ioctls that are made in a row, and what came of it.
struct kmig_step {
    unsigned long request;
    void *arg;
    const void *held;          // expected_bytes that are to be as those at expected afterwards; or NULL
    const void *expected;
    uint32_t expected_bytes;
    int fd;
    int result;                // as of kmig_ioctl
    int differs;               // whether they are not
};

// Make all of them, in order, whatever comes of each.
void kmig_steps_run(struct kmig_step *step, uint32_t nr_steps);

// The host's time stamp counter now.
uint64_t kmig_host_tsc(void);
