// What Python sees of the kernel's interface. cffi takes every value, offset and size that stands here as `...` from
// <linux/kvm.h> when the C core is compiled; padding is left out, and is written as zero.

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;

struct kvm_enable_cap { __u32 cap; __u32 flags; __u64 args[4]; ...; };
struct kvm_device_attr { __u32 flags; __u32 group; __u64 attr; __u64 addr; ...; };

struct kvm_msr_list { __u32 nmsrs; ...; };
struct kvm_msr_entry { __u32 index; __u64 data; ...; };
struct kvm_msrs { __u32 nmsrs; ...; };
struct kvm_cpuid_entry2 {
    __u32 function; __u32 index; __u32 flags; __u32 eax; __u32 ebx; __u32 ecx; __u32 edx; ...;
};
struct kvm_cpuid2 { __u32 nent; ...; };

struct kvm_regs {
    __u64 rax; __u64 rbx; __u64 rcx; __u64 rdx; __u64 rsi; __u64 rdi; __u64 rsp; __u64 rbp;
    __u64 r8; __u64 r9; __u64 r10; __u64 r11; __u64 r12; __u64 r13; __u64 r14; __u64 r15;
    __u64 rip; __u64 rflags; ...;
};
struct kvm_segment {
    __u64 base; __u32 limit; __u16 selector; __u8 type; __u8 present; __u8 dpl; __u8 db;
    __u8 s; __u8 l; __u8 g; __u8 avl; __u8 unusable; ...;
};
struct kvm_dtable { __u64 base; __u16 limit; ...; };
struct kvm_sregs {
    struct kvm_segment cs; struct kvm_segment ds; struct kvm_segment es; struct kvm_segment fs; struct kvm_segment gs;
    struct kvm_segment ss; struct kvm_segment tr; struct kvm_segment ldt;
    struct kvm_dtable gdt; struct kvm_dtable idt;
    __u64 cr0; __u64 cr2; __u64 cr3; __u64 cr4; __u64 cr8; __u64 efer; __u64 apic_base;
    __u64 interrupt_bitmap[...]; ...;
};
struct kvm_sregs2 {
    struct kvm_segment cs; struct kvm_segment ds; struct kvm_segment es; struct kvm_segment fs; struct kvm_segment gs;
    struct kvm_segment ss; struct kvm_segment tr; struct kvm_segment ldt;
    struct kvm_dtable gdt; struct kvm_dtable idt;
    __u64 cr0; __u64 cr2; __u64 cr3; __u64 cr4; __u64 cr8; __u64 efer; __u64 apic_base;
    __u64 flags; __u64 pdptrs[...]; ...;
};
struct kvm_fpu {
    __u8 fpr[8][16]; __u16 fcw; __u16 fsw; __u8 ftwx; __u16 last_opcode; __u64 last_ip;
    __u64 last_dp; __u8 xmm[16][16]; __u32 mxcsr; ...;
};
struct kvm_lapic_state { char regs[...]; ...; };
struct kvm_xsave { __u32 region[...]; ...; };
struct kvm_mp_state { __u32 mp_state; ...; };
struct kvm_debugregs { __u64 db[...]; __u64 dr6; __u64 dr7; __u64 flags; ...; };
struct kvm_xcr { __u32 xcr; __u64 value; ...; };
struct kvm_xcrs { __u32 nr_xcrs; __u32 flags; struct kvm_xcr xcrs[...]; ...; };
struct kvm_vcpu_events {
    struct { __u8 injected; __u8 nr; __u8 has_error_code; __u8 pending; __u32 error_code; } exception;
    struct { __u8 injected; __u8 nr; __u8 soft; __u8 shadow; } interrupt;
    struct { __u8 injected; __u8 pending; __u8 masked; __u8 pad; } nmi;
    __u32 sipi_vector; __u32 flags;
    struct { __u8 smm; __u8 pending; __u8 smm_inside_nmi; __u8 latched_init; } smi;
    struct { __u8 pending; } triple_fault;
    __u8 exception_has_payload; __u64 exception_payload; ...;
};
struct kvm_nested_state { __u16 flags; __u16 format; __u32 size; ...; };
struct kvm_translation {
    __u64 linear_address; __u64 physical_address; __u8 valid; __u8 writeable; __u8 usermode; ...;
};
struct kvm_interrupt { __u32 irq; ...; };
struct kvm_guest_debug_arch { __u64 debugreg[...]; ...; };
struct kvm_guest_debug { __u32 control; struct kvm_guest_debug_arch arch; ...; };

struct kvm_pit_config { __u32 flags; ...; };
struct kvm_pit_channel_state {
    __u32 count; __u16 latched_count; __u8 count_latched; __u8 status_latched; __u8 status;
    __u8 read_state; __u8 write_state; __u8 write_latch; __u8 rw_mode; __u8 mode; __u8 bcd;
    __u8 gate; __s64 count_load_time; ...;
};
struct kvm_pit_state2 { struct kvm_pit_channel_state channels[...]; __u32 flags; ...; };
struct kvm_pic_state {
    __u8 last_irr; __u8 irr; __u8 imr; __u8 isr; __u8 priority_add; __u8 irq_base;
    __u8 read_reg_select; __u8 poll; __u8 special_mask; __u8 init_state; __u8 auto_eoi;
    __u8 rotate_on_auto_eoi; __u8 special_fully_nested_mode; __u8 init4; __u8 elcr; __u8 elcr_mask; ...;
};
struct kvm_ioapic_state {
    __u64 base_address; __u32 ioregsel; __u32 id; __u32 irr; union { __u64 bits; } redirtbl[...]; ...;
};
struct kvm_irqchip {
    __u32 chip_id;
    union { char dummy[512]; } chip; ...;
};
struct kvm_irq_level { union { __u32 irq; __s32 status; }; __u32 level; ...; };
struct kvm_irqfd { __u32 fd; __u32 gsi; __u32 flags; __u32 resamplefd; ...; };
struct kvm_ioeventfd { __u64 datamatch; __u64 addr; __u32 len; __s32 fd; __u32 flags; ...; };
struct kvm_msi { __u32 address_lo; __u32 address_hi; __u32 data; __u32 flags; ...; };
struct kvm_clock_data { __u64 clock; __u32 flags; __u64 realtime; __u64 host_tsc; ...; };

struct kvm_debug_exit_arch { __u32 exception; __u32 pad; __u64 pc; __u64 dr6; __u64 dr7; };
struct kvm_run {
    __u8 request_interrupt_window; __u8 immediate_exit;
    __u32 exit_reason; __u8 ready_for_interrupt_injection; __u8 if_flag; __u16 flags;
    __u64 cr8; __u64 apic_base;
    union {
        struct { __u64 hardware_exit_reason; } hw;
        struct { __u64 hardware_entry_failure_reason; __u32 cpu; } fail_entry;
        struct { __u32 exception; __u32 error_code; } ex;
        struct { __u8 direction; __u8 size; __u16 port; __u32 count; __u64 data_offset; } io;
        struct { struct kvm_debug_exit_arch arch; } debug;
        struct { __u64 phys_addr; __u8 data[8]; __u32 len; __u8 is_write; } mmio;
        struct { __u64 nr; __u64 args[6]; __u64 ret; __u32 longmode; __u32 pad; } hypercall;
        struct { __u64 rip; __u32 is_write; __u32 pad; } tpr_access;
        struct { __u32 suberror; __u32 ndata; __u64 data[16]; } internal;
        struct { __u32 suberror; __u32 ndata; __u64 flags; __u8 insn_size; __u8 insn_bytes[15]; }
            emulation_failure;
        struct { __u32 type; __u32 ndata; __u64 data[16]; } system_event;
        struct { __u8 vector; } eoi;
        struct { __u8 error; __u8 pad[7]; __u32 reason; __u32 index; __u64 data; } msr;
        struct { __u32 flags; } notify;
        char padding[256];
    };
    ...;
};
