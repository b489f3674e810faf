#include "vcpu.h"

#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

// Of the realtime signals, since those queue and nobody sends them by accident. glibc keeps the first few for itself.
#define KICK_SIGNAL (SIGRTMIN + 7)
#define KERNEL_SIGSET_BYTES 8   // _NSIG / 8: what KVM_SET_SIGNAL_MASK wants, unlike glibc's larger sigset_t

static void on_kick(int signal_number)
{
    (void)signal_number;
}

int kmig_kick_install(void)
{
    struct sigaction action = { .sa_handler = on_kick }, old;

    // No SA_RESTART: the signal has to bring KVM_RUN back with EINTR.
    if (sigaction(KICK_SIGNAL, NULL, &old) < 0)
        return -errno;
    if (old.sa_handler != SIG_DFL && old.sa_handler != on_kick)
        return -EBUSY;
    return sigaction(KICK_SIGNAL, &action, NULL) < 0 ? -errno : 0;
}

// A vCPU's thread takes no signals but the kick and those that its own faults raise: SIGINT and SIGTERM are for the
// main thread, which would not wake from a wait for them when they land here.
int kmig_kick_set_masks(struct kmig_vcpu *vcpu)
{
    struct {
        struct kvm_signal_mask head;
        uint8_t set[KERNEL_SIGSET_BYTES];
    } mask;
    sigset_t blocked;

    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    sigdelset(&blocked, SIGABRT);
    sigdelset(&blocked, SIGTRAP);
    sigdelset(&blocked, SIGPROF);
    sigdelset(&blocked, KICK_SIGNAL);
    if (vcpu->kick == KMIG_KICK_IMMEDIATE_EXIT)
        return -pthread_sigmask(SIG_SETMASK, &blocked, NULL);
    // Open inside KVM_RUN, where the kernel swaps the mask atomically, and nowhere else.
    mask.head.len = KERNEL_SIGSET_BYTES;
    memcpy(&mask.head.sigset, &blocked, KERNEL_SIGSET_BYTES);
    if (ioctl(vcpu->fd, KVM_SET_SIGNAL_MASK, &mask) < 0)
        return -errno;
    sigaddset(&blocked, KICK_SIGNAL);
    return -pthread_sigmask(SIG_SETMASK, &blocked, NULL);
}

// The order matters: a thread that is about to enter sees the flag, one that has entered is hit by the signal.
void kmig_kick_request(struct kmig_vcpu *vcpu)
{
    if (vcpu->kick == KMIG_KICK_IMMEDIATE_EXIT)
        __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (vcpu->tid && !vcpu->parked)
        syscall(SYS_tgkill, getpid(), vcpu->tid, KICK_SIGNAL);
}

void kmig_kick_withdraw(struct kmig_vcpu *vcpu)
{
    static const struct timespec now = { 0, 0 };
    sigset_t kick;

    if (vcpu->kick == KMIG_KICK_IMMEDIATE_EXIT) {
        __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        return;
    }
    // The signal is blocked in this thread, so the one that ended KVM_RUN is still pending.
    sigemptyset(&kick);
    sigaddset(&kick, KICK_SIGNAL);
    while (sigtimedwait(&kick, NULL, &now) == KICK_SIGNAL || errno == EINTR)
        ;
}
