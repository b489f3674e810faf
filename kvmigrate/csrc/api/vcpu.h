// One vCPU and the thread that runs it.

// Why kmig_vcpu_run came back.
#define KMIG_RUN_EXIT 0    // run->exit_reason is for a device, or for the caller to refuse by name
#define KMIG_RUN_QUIT 1    // kmig_vcpus_quit was called
#define KMIG_RUN_DEBUG 2   // KVM_EXIT_DEBUG: single step or a breakpoint

// How a running vCPU is kicked out of KVM_RUN.
#define KMIG_KICK_IMMEDIATE_EXIT 0   // KVM_CAP_IMMEDIATE_EXIT
#define KMIG_KICK_SIGNAL_MASK 1      // KVM_SET_SIGNAL_MASK: the signal is open only inside KVM_RUN

struct kmig_vcpu;
struct kmig_vcpus;

// All vCPUs of one VM: what is paused and resumed together. Starts paused.
int kmig_vcpus_create(struct kmig_vcpus **ret);
void kmig_vcpus_destroy(struct kmig_vcpus *vcpus);

// Adopt the vCPU behind fd: map its run area (run_bytes from KVM_GET_VCPU_MMAP_SIZE).
int kmig_vcpu_create(struct kmig_vcpus *vcpus, int fd, size_t run_bytes, int kick, struct kmig_vcpu **ret);
void kmig_vcpu_destroy(struct kmig_vcpu *vcpu);
struct kvm_run *kmig_vcpu_run_area(struct kmig_vcpu *vcpu);

// The body of a vCPU thread: enter KVM_RUN again and again; park while the group is paused; come back with KMIG_RUN_…
// or -errno. The thread that calls this first is the vCPU's thread until KMIG_RUN_QUIT, an error or kmig_vcpu_leave;
// another one gets -EPERM. The thread takes no signals any more but the kick and its own faults.
//
// A vCPU parks only after KVM_RUN was re-entered with an exit requested: an I/O, MMIO or MSR exit is completed by the
// next KVM_RUN, and until then its result is in no state that can be read (KVM api.rst, note on KVM_EXIT_IO).
int kmig_vcpu_run(struct kmig_vcpu *vcpu);

// Answer in C, from now on, the interrupt registers of the virtio-mmio device at gpa, and what kmig_uart_read and _write do
// for the UART at `port` as long as nobody else must hear of it: kmig_vcpu_run does not come back for them. Before any vCPU
// has a thread (-EBUSY); what is named must outlive the threads. -EEXIST, -ENOSPC.
struct kmig_virtio;
struct kmig_uart;
int kmig_vcpus_answer_virtio(struct kmig_vcpus *vcpus, uint64_t gpa, struct kmig_virtio *device);
int kmig_vcpus_answer_uart(struct kmig_vcpus *vcpus, uint16_t port, struct kmig_uart *uart);

// The vCPU's thread will not come back: a pause no longer waits for it. What its last exit left half-done stays so.
void kmig_vcpu_leave(struct kmig_vcpu *vcpu);

// Pause: request it of all, kick each, wait until every vCPU that has a thread is parked. -ETIMEDOUT after timeout_ms,
// with the pause still requested; -EDEADLK from a vCPU's own thread, with the pause requested too. Nested calls are one
// pause; idempotent.
int kmig_vcpus_pause(struct kmig_vcpus *vcpus, int timeout_ms);

// The same without waiting: a vCPU's own thread may call it (the guest ended, a breakpoint) and park by itself.
void kmig_vcpus_request_pause(struct kmig_vcpus *vcpus);
void kmig_vcpus_resume(struct kmig_vcpus *vcpus);
void kmig_vcpus_quit(struct kmig_vcpus *vcpus);

// The name of an exit reason as <linux/kvm.h> has it, without KVM_EXIT_; NULL for one that the header does not know.
const char *kmig_exit_name(uint32_t exit_reason);

// How often each vCPU entered KVM_RUN, for tests that prove that a machine has never run.
uint64_t kmig_vcpu_nr_entries(struct kmig_vcpu *vcpu);
