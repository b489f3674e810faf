// What the guests' assembly files agree on: selectors, ports, system calls, and the per-vCPU block.
//
// Registers of a vCPU in ring 3, from guest_main on (the library keeps all of them):
//   rbp  heartbeats sent             r13  xorshift64 state
//   r12  last ticket drawn           r14  this vCPU's block, below
//   r15  page updates done           xmm15 the same total, in both halves
//   xmm4..xmm13 and st(0)            constants that must never change (registers.S)
// Everything else is scratch. xmm14 holds the increment of xmm15.

#define MAX_CPUS        8
#define STACK_BYTES     4096
#define MAPPED_GIB      16              // RAM above this is left alone

#define KERNEL_CS       0x08
#define KERNEL_DS       0x10
#define BOOT_CS32       0x18
#define USER_DS         0x23
#define USER_CS         0x2b
#define TSS_SELECTOR    0x30            // 16 bytes per vCPU
#define USER_RFLAGS     0x3202          // IOPL 3, interrupts on

#define COM1            0x3f8
#define PIT_COUNTER0    0x40
#define PIT_COMMAND     0x43
#define DEBUG_EXIT      0xf4            // isa-debug-exit: status (value << 1) | 1
#define POWER_OFF       0x604           // ACPI PM1a control: SLP_EN
#define SLP_EN          0x2000

#define LAPIC           0xfee00000
#define LAPIC_EOI       0x0b0
#define LAPIC_SPURIOUS  0x0f0
#define LAPIC_ICR_LOW   0x300
#define LAPIC_ICR_HIGH  0x310
#define LAPIC_LVT_TIMER 0x320
#define LAPIC_LVT_LINT0 0x350
#define LAPIC_INITIAL   0x380
#define LAPIC_CURRENT   0x390
#define LAPIC_DIVIDE    0x3e0
#define IOAPIC          0xfec00000

#define VECTOR_PIT      0x20            // through the PIC: LINT0 is ExtINT
#define VECTOR_TIMER    0x40            // LAPIC timer
#define VECTOR_SERIAL   0x44            // through the IOAPIC
#define VECTOR_UD       6
#define VECTOR_SPURIOUS 0xff

// UD2 with the number in eax is a system call: what only ring 0 may do. Scratch registers are lost. Not INT, which
// kvm_pvm does not emulate, and not SYSCALL, whose MSRs are under test.
#define SYS_WAIT        0               // HLT until an interrupt
#define SYS_SET_STATE   1               // load the known MSRs, debug registers, CR2 and CR8
#define SYS_CHECK_STATE 2               // eax = 0, or the number of the item that changed; rbx found, rcx expected
#define SYS_ENABLE_YMM  3               // CR4.OSXSAVE, XCR0 = x87, SSE, AVX

// A page under the ledger: its header is in the middle, so that writes may cross both of the page's borders.
#define PAGE_GPA        64
#define PAGE_SEQ        72
#define PAGE_INVERSE    80
#define PAGE_SUM        88
#define PAGE_HEADER_END 96

// The per-vCPU block, CPU_BYTES each, zeroed at start.
#define CPU_INDEX       0
#define CPU_TSC         8               // rdtsc at the last look
#define CPU_CLOCK       16              // guest time in TSC cycles: sum of clamped differences
#define CPU_NEXT_BEAT   24              // in guest time
#define CPU_NEXT_WRITE  32
#define CPU_FIRST       40              // own pages: [first, end)
#define CPU_END         48
#define CPU_CURSOR      56              // next own page to check
#define CPU_FILL_CURSOR 64              // next filled page to check
#define CPU_SHARED      72              // tickets drawn from the shared counter
#define CPU_DONE        80              // set when the last check is over
#define CPU_UPDATES     88              // r15 at that time
#define CPU_TICKS       96              // PIT ticks at the last progress
#define CPU_TICK_CLOCK  104             // guest time then
#define CPU_SCRATCH     112
#define CPU_LINE        128             // one line of output is built here
#define CPU_BYTES       512
