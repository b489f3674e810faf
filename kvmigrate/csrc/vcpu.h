// What vcpu.c and kick.c share: the vCPU and its group, and how a vCPU is brought out of KVM_RUN.
#ifndef KMIG_VCPU_H
#define KMIG_VCPU_H

#include "core.h"

#define KMIG_MAX_ANSWERED_VIRTIO 16

// What is answered here instead of in the caller of kmig_vcpu_run. Changes only while no vCPU has a thread.
struct kmig_answers {
    uint32_t nr_virtio;
    struct {
        uint64_t gpa;
        struct kmig_virtio *device;
    } virtio[KMIG_MAX_ANSWERED_VIRTIO];
    struct kmig_uart *uart;
    uint16_t uart_port;
};

struct kmig_vcpu {
    struct kmig_vcpus *group;
    struct kmig_vcpu *next;
    struct kvm_run *run;
    size_t run_bytes;
    int fd;
    int kick;
    pid_t tid;               // of its thread; 0 without one
    bool parked;
    bool settled;            // nothing half-done in the kernel: never entered, or KVM_RUN said EINTR last
    unsigned nr_eagain;      // in a row
    uint64_t nr_entries;
};

struct kmig_vcpus {
    pthread_mutex_t lock;    // guards everything below, and of each vCPU: tid, parked, the request to leave KVM_RUN
    pthread_cond_t stopped;  // a vCPU parked or left
    pthread_cond_t changed;  // paused or quit changed
    bool paused;
    bool quit;
    int nr_running;          // vCPUs that have a thread and are not parked
    struct kmig_vcpu *first;
    struct kmig_answers answers;
};

// Answer the exit in the vCPU's run area if it is of a register that the group's answers have. Returns false, with nothing
// done, when it is for the caller of kmig_vcpu_run.
bool kmig_vcpu_answer(struct kmig_vcpu *vcpu);

// The no-op handler of the kick signal.
int kmig_kick_install(void);

// For the calling thread, which becomes the vCPU's.
int kmig_kick_set_masks(struct kmig_vcpu *vcpu);

// Under the lock. Make the current or the next KVM_RUN return EINTR, once it has completed what was half-done.
void kmig_kick_request(struct kmig_vcpu *vcpu);

// Under the lock, by the vCPU's own thread when nothing is asked of it any more: take back every request. All senders
// hold the lock, so none is lost.
void kmig_kick_withdraw(struct kmig_vcpu *vcpu);

#endif
