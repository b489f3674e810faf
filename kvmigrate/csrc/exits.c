#include "core.h"

#define NAME(reason) \
    case KVM_EXIT_##reason: \
        return #reason

const char *kmig_exit_name(uint32_t exit_reason)
{
    switch (exit_reason) {
        NAME(UNKNOWN);
        NAME(EXCEPTION);
        NAME(IO);
        NAME(HYPERCALL);
        NAME(DEBUG);
        NAME(HLT);
        NAME(MMIO);
        NAME(IRQ_WINDOW_OPEN);
        NAME(SHUTDOWN);
        NAME(FAIL_ENTRY);
        NAME(INTR);
        NAME(SET_TPR);
        NAME(TPR_ACCESS);
        NAME(INTERNAL_ERROR);
        NAME(NMI);
        NAME(SYSTEM_EVENT);
        NAME(IOAPIC_EOI);
        NAME(HYPERV);
        NAME(X86_RDMSR);
        NAME(X86_WRMSR);
        NAME(DIRTY_RING_FULL);
        NAME(X86_BUS_LOCK);
        NAME(XEN);
        NAME(NOTIFY);
#ifdef KVM_EXIT_MEMORY_FAULT
        NAME(MEMORY_FAULT);
#endif
#ifdef KVM_EXIT_TDX
        NAME(TDX);
#endif
    }
    return NULL;
}
