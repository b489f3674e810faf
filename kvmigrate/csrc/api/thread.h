// The calling thread, as the kernel's scheduler sees it.

// Let it run for so long at a time (0.1 to 100 ms) when others want its processor, and in return, when it wakes up, before
// those that run for longer at a time (Linux 6.12, sched_setattr(2): sched_runtime). Older kernels change nothing.
int kmig_thread_slice(uint64_t slice_ns);
