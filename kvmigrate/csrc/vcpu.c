#include "internal.h"
#include "vcpu.h"

#include <sched.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define KMIG_RUN_AGAIN 100      // inside this file: nothing to report, go round
#define MAX_QUIET_EAGAIN 2
#define QUICK_EXIT_NS 200000

static int init_monotonic(pthread_cond_t *cond)
{
    pthread_condattr_t attr;
    int rc = pthread_condattr_init(&attr);

    if (rc == 0) {
        pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
        rc = pthread_cond_init(cond, &attr);
        pthread_condattr_destroy(&attr);
    }
    return -rc;
}

static struct timespec deadline_after(int64_t ns)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += ns / 1000000000;
    at.tv_nsec += ns % 1000000000;
    if (at.tv_nsec >= 1000000000) {
        at.tv_nsec -= 1000000000;
        at.tv_sec++;
    }
    return at;
}

int kmig_vcpus_create(struct kmig_vcpus **ret)
{
    struct kmig_vcpus *vcpus;
    int rc = kmig_kick_install();

    if (rc < 0)
        return rc;
    vcpus = calloc(1, sizeof(*vcpus));
    if (!vcpus)
        return -ENOMEM;
    vcpus->paused = true;
    pthread_mutex_init(&vcpus->lock, NULL);
    rc = init_monotonic(&vcpus->stopped);
    if (rc == 0)
        rc = init_monotonic(&vcpus->changed);
    if (rc < 0) {
        free(vcpus);
        return rc;
    }
    *ret = vcpus;
    return 0;
}

void kmig_vcpus_destroy(struct kmig_vcpus *vcpus)
{
    if (!vcpus)
        return;
    while (vcpus->first)
        kmig_vcpu_destroy(vcpus->first);
    pthread_cond_destroy(&vcpus->changed);
    pthread_cond_destroy(&vcpus->stopped);
    pthread_mutex_destroy(&vcpus->lock);
    free(vcpus);
}

int kmig_vcpu_create(struct kmig_vcpus *vcpus, int fd, size_t run_bytes, int kick, struct kmig_vcpu **ret)
{
    struct kmig_vcpu *vcpu;

    if (run_bytes < sizeof(struct kvm_run) || (kick != KMIG_KICK_IMMEDIATE_EXIT && kick != KMIG_KICK_SIGNAL_MASK))
        return -EINVAL;
    vcpu = calloc(1, sizeof(*vcpu));
    if (!vcpu)
        return -ENOMEM;
    vcpu->run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (vcpu->run == MAP_FAILED) {
        int rc = -errno;

        free(vcpu);
        return rc;
    }
    vcpu->group = vcpus;
    vcpu->run_bytes = run_bytes;
    vcpu->fd = fd;
    vcpu->kick = kick;
    vcpu->settled = true;
    pthread_mutex_lock(&vcpus->lock);
    vcpu->next = vcpus->first;
    vcpus->first = vcpu;
    pthread_mutex_unlock(&vcpus->lock);
    *ret = vcpu;
    return 0;
}

// Under the lock. The vCPU has no thread from now on.
static void forget_thread(struct kmig_vcpu *vcpu)
{
    if (!vcpu->tid)
        return;
    vcpu->tid = 0;
    if (!vcpu->parked)
        vcpu->group->nr_running--;
    vcpu->parked = false;
    pthread_cond_broadcast(&vcpu->group->stopped);
}

void kmig_vcpu_leave(struct kmig_vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->group->lock);
    forget_thread(vcpu);
    pthread_mutex_unlock(&vcpu->group->lock);
}

void kmig_vcpu_destroy(struct kmig_vcpu *vcpu)
{
    struct kmig_vcpu **at;

    if (!vcpu)
        return;
    pthread_mutex_lock(&vcpu->group->lock);
    forget_thread(vcpu);
    for (at = &vcpu->group->first; *at && *at != vcpu; at = &(*at)->next)
        ;
    if (*at)
        *at = vcpu->next;
    pthread_mutex_unlock(&vcpu->group->lock);
    munmap(vcpu->run, vcpu->run_bytes);
    free(vcpu);
}

struct kvm_run *kmig_vcpu_run_area(struct kmig_vcpu *vcpu)
{
    return vcpu->run;
}

uint64_t kmig_vcpu_nr_entries(struct kmig_vcpu *vcpu)
{
    return __atomic_load_n(&vcpu->nr_entries, __ATOMIC_RELAXED);
}

// Make the calling thread the vCPU's.
static int adopt(struct kmig_vcpu *vcpu, pid_t tid)
{
    struct kmig_vcpus *group = vcpu->group;
    int rc;

    pthread_mutex_lock(&group->lock);
    rc = vcpu->tid ? -EPERM : kmig_kick_set_masks(vcpu);
    if (rc == 0) {
        vcpu->tid = tid;
        group->nr_running++;
        if (group->paused || group->quit)
            kmig_kick_request(vcpu);
    }
    pthread_mutex_unlock(&group->lock);
    return rc;
}

// Wait while the group is paused. Only a settled vCPU comes here.
static int park_if_asked(struct kmig_vcpu *vcpu)
{
    struct kmig_vcpus *group = vcpu->group;
    int rc = KMIG_RUN_AGAIN;

    pthread_mutex_lock(&group->lock);
    if (group->paused && !group->quit) {
        vcpu->parked = true;
        group->nr_running--;
        pthread_cond_broadcast(&group->stopped);
        while (group->paused && !group->quit)
            pthread_cond_wait(&group->changed, &group->lock);
        vcpu->parked = false;
        group->nr_running++;
    }
    if (group->quit) {
        forget_thread(vcpu);
        rc = KMIG_RUN_QUIT;
    } else {
        kmig_kick_withdraw(vcpu);
    }
    pthread_mutex_unlock(&group->lock);
    return rc;
}

// KVM_RUN says EAGAIN when an application processor that waits for INIT was woken by something else. It blocks in the
// kernel again at the next try, but an event that it may not take yet (an NMI) would make that a busy loop.
static void back_off(struct kmig_vcpu *vcpu)
{
    struct kmig_vcpus *group = vcpu->group;
    struct timespec until = deadline_after(1000000);

    if (++vcpu->nr_eagain <= MAX_QUIET_EAGAIN)
        return;
    pthread_mutex_lock(&group->lock);
    if (!group->paused && !group->quit)
        pthread_cond_timedwait(&group->changed, &group->lock, &until);
    pthread_mutex_unlock(&group->lock);
}

static int enter(struct kmig_vcpu *vcpu)
{
    int rc;

    __atomic_fetch_add(&vcpu->nr_entries, 1, __ATOMIC_RELAXED);
    rc = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? -errno : 0;
    // Both come after the pending I/O was completed (or where there can be none), so the vCPU may park now.
    vcpu->settled = rc == -EINTR || rc == -EAGAIN;
    if (rc == -EAGAIN)
        back_off(vcpu);
    else
        vcpu->nr_eagain = 0;
    if (vcpu->settled)
        return KMIG_RUN_AGAIN;
    if (rc < 0)
        return rc;
    // Answered like any other, so not settled: the next KVM_RUN completes it, and only then may the vCPU park.
    if (kmig_vcpu_answer(vcpu))
        return KMIG_RUN_AGAIN;
    return vcpu->run->exit_reason == KVM_EXIT_DEBUG ? KMIG_RUN_DEBUG : KMIG_RUN_EXIT;
}

// No look at paused before KVM_RUN: whoever pauses has made this or the next KVM_RUN return EINTR, and KVM_RUN has then
// also completed the I/O that the caller just answered. Such a completion may itself end in the next exit (the next
// piece of a string instruction or of a wide MMIO): it goes to the caller like any other, and the pause waits for it.
int kmig_vcpu_run(struct kmig_vcpu *vcpu)
{
    pid_t tid = gettid();
    int rc = KMIG_RUN_AGAIN;

    if (vcpu->tid != tid) {
        rc = adopt(vcpu, tid);
        if (rc < 0)
            return rc;
        rc = KMIG_RUN_AGAIN;
    }
    while (rc == KMIG_RUN_AGAIN) {
        if (vcpu->settled)
            rc = park_if_asked(vcpu);
        if (rc == KMIG_RUN_AGAIN)
            rc = enter(vcpu);
    }
    if (rc < 0)
        kmig_vcpu_leave(vcpu);
    return rc;
}

// Under the lock.
static void request_all(struct kmig_vcpus *vcpus)
{
    struct kmig_vcpu *vcpu;

    for (vcpu = vcpus->first; vcpu; vcpu = vcpu->next)
        kmig_kick_request(vcpu);
    pthread_cond_broadcast(&vcpus->changed);
}

static bool is_vcpu_thread(const struct kmig_vcpus *vcpus, pid_t tid)
{
    const struct kmig_vcpu *vcpu;

    for (vcpu = vcpus->first; vcpu; vcpu = vcpu->next)
        if (vcpu->tid == tid)
            return true;
    return false;
}

void kmig_vcpus_request_pause(struct kmig_vcpus *vcpus)
{
    pthread_mutex_lock(&vcpus->lock);
    if (!vcpus->paused) {
        vcpus->paused = true;
        request_all(vcpus);
    }
    pthread_mutex_unlock(&vcpus->lock);
}

// Most come out within some tens of microseconds, and to be woken for it would take as long again.
static void await_quick_ones(struct kmig_vcpus *vcpus)
{
    uint64_t until_ns = kmig_now_ns() + QUICK_EXIT_NS;

    while (vcpus->nr_running > 0 && kmig_now_ns() < until_ns) {
        pthread_mutex_unlock(&vcpus->lock);
        sched_yield();
        pthread_mutex_lock(&vcpus->lock);
    }
}

int kmig_vcpus_pause(struct kmig_vcpus *vcpus, int timeout_ms)
{
    struct timespec until = deadline_after((int64_t)timeout_ms * 1000000);
    int rc = 0;

    kmig_vcpus_request_pause(vcpus);
    pthread_mutex_lock(&vcpus->lock);
    if (is_vcpu_thread(vcpus, gettid()))
        rc = EDEADLK;
    else
        await_quick_ones(vcpus);
    while (rc == 0 && vcpus->nr_running > 0)
        rc = pthread_cond_timedwait(&vcpus->stopped, &vcpus->lock, &until);
    if (vcpus->nr_running == 0)
        rc = 0;
    pthread_mutex_unlock(&vcpus->lock);
    return -rc;
}

void kmig_vcpus_resume(struct kmig_vcpus *vcpus)
{
    pthread_mutex_lock(&vcpus->lock);
    vcpus->paused = false;
    pthread_cond_broadcast(&vcpus->changed);
    pthread_mutex_unlock(&vcpus->lock);
}

void kmig_vcpus_quit(struct kmig_vcpus *vcpus)
{
    pthread_mutex_lock(&vcpus->lock);
    vcpus->quit = true;
    request_all(vcpus);
    pthread_mutex_unlock(&vcpus->lock);
}
