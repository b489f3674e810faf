// ioctl(fd, request, arg) as a result code. Retries EINTR for every request but KVM_RUN, which is not called through here.
int kmig_ioctl(int fd, unsigned long request, void *arg);

// The same for requests whose argument is a number.
int kmig_ioctl_value(int fd, unsigned long request, unsigned long arg);

// One of several ioctls that are made in a row on one piece of memory, in which the places are offsets.
struct kmig_step {
    unsigned long request;
    uint32_t arg;
    uint32_t held;             // expected_bytes here are to be as those at expected afterwards
    uint32_t expected;
    uint32_t expected_bytes;
    uint32_t item;             // of which it is a part
    int wanted;                // the result that it is to have, as of kmig_ioctl
};

// What came of one item: the first result that is an error, or 0; and whether anything came otherwise than it was to.
struct kmig_outcome {
    int rc;
    int differs;
};

// Make all of them, in order, whatever comes of each. The outcomes are those of the items, all zero before. Returns whether
// all came as it was to.
int kmig_steps_run(int fd, char *memory, const struct kmig_step *step, uint32_t nr_steps, struct kmig_outcome *outcomes);

// One MSR of a vCPU. Returns 1, or 0 where it cannot be read or does not take the value.
int kmig_msr_get(int fd, uint32_t index, uint64_t *value);
int kmig_msr_set(int fd, uint32_t index, uint64_t value);

// KVM_GET_, KVM_SET_ or KVM_HAS_DEVICE_ATTR of a vCPU's TSC offset.
int kmig_tsc_offset(int fd, unsigned long request, uint64_t *offset);

// The host's time stamp counter now.
uint64_t kmig_host_tsc(void);
