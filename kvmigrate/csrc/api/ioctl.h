// ioctl(fd, request, arg) as a result code. Retries EINTR for every request but KVM_RUN, which is not called through here.
int kmig_ioctl(int fd, unsigned long request, void *arg);

// The same for requests whose argument is a number.
int kmig_ioctl_value(int fd, unsigned long request, unsigned long arg);

// The host's time stamp counter now.
uint64_t kmig_host_tsc(void);
