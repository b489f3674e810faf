// From multiboot's 32-bit entry, or a SIPI, to guest_main in 64-bit ring 3.
//
// Ring 3 because some KVM backends run it natively and interpret everything else; so ring 0 does only what ring 3
// may not. The page tables map MAPPED_GIB GiB one to one with 2 MiB pages, all open to ring 3.
#include "guest.h"
    .intel_syntax noprefix

#define CR0_PG_NE_MP_PE 0x80000023
#define CR4_SSE_PAE     0x620           // OSXMMEXCPT, OSFXSR, PAE
#define MSR_EFER        0xc0000080
#define EFER_LME        0x100
#define PAGE_USER_RW    7
#define PAGE_2M         0x80
#define TSS_IO_BITMAP   104
#define TSS_BYTES       512
#define PORTS_OPEN      0x700
#define AP_BASE         0x8000          // SIPI vector 8

    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 3, -(0x1badb002 + 3)

    .text
    .code32
    .globl _start
_start:
    cmp eax, 0x2badb002
    jne dead32
    mov [multiboot_info], ebx
    mov al, 0xff                        // whatever the firmware left: no interrupt from the PICs
    out 0x21, al
    out 0xa1, al
    lgdt [gdt_pointer]
    mov esp, offset kernel_stacks + STACK_BYTES
    call build_page_tables
    mov esi, offset ap_entry            // the APs' real-mode part, below 1 MiB
    mov edi, AP_BASE
    mov ecx, offset ap_entry_end - ap_entry
    rep movsb
    xor ebx, ebx                        // vCPU 0
    jmp enter_long_mode

dead32:
    hlt
    jmp dead32

build_page_tables:
    mov eax, offset page_directories
    or eax, PAGE_USER_RW
    mov edi, offset pdpt
    mov ecx, MAPPED_GIB
1:  mov [edi], eax
    add eax, 4096
    add edi, 8
    loop 1b
    mov eax, offset pdpt
    or eax, PAGE_USER_RW
    mov [pml4], eax
    mov edi, offset page_directories
    mov eax, PAGE_USER_RW | PAGE_2M
    xor edx, edx
2:  mov [edi], eax
    mov [edi + 4], edx
    add edi, 8
    add eax, 0x200000
    adc edx, 0
    cmp edi, offset page_directories + MAPPED_GIB * 4096
    jb 2b
    ret

// ebx: vCPU index.
enter_long_mode:
    mov eax, CR4_SSE_PAE
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, CR0_PG_NE_MP_PE
    mov cr0, eax
    .att_syntax
    ljmp $KERNEL_CS, $long_mode
    .intel_syntax noprefix

    .code64
long_mode:
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov eax, ebx                        // rsp = kernel_stacks + (index + 1) * STACK_BYTES
    inc eax
    imul eax, eax, STACK_BYTES
    lea rsp, [kernel_stacks + rax]
    call load_tss
    test ebx, ebx
    jnz 1f
    call build_idt
1:  lidt [idt_pointer]
    mov eax, LAPIC
    mov dword ptr [rax + LAPIC_SPURIOUS], 0x100 | VECTOR_SPURIOUS
    imul edi, ebx, CPU_BYTES
    lea r14, [cpus + rdi]
    mov [r14 + CPU_INDEX], rbx
    mov eax, ebx
    inc eax
    imul eax, eax, STACK_BYTES
    lea rcx, [user_stacks + rax]
    push USER_DS
    push rcx
    push USER_RFLAGS
    push USER_CS
    lea rax, [guest_main]
    push rax
    iretq

// ebx: vCPU index, rsp: its ring-0 stack. The TSS says which stack ring 0 gets and, all bits zero, that ring 3 may
// use the ports below PORTS_OPEN; IOPL alone would do, but kvm_pvm drops it on the way to ring 3.
load_tss:
    imul eax, ebx, TSS_BYTES
    lea rdi, [task_states + rax]
    lea rdx, [rsp + 8]
    mov [rdi + 4], rdx
    mov word ptr [rdi + 102], TSS_IO_BITMAP
    mov byte ptr [rdi + TSS_IO_BITMAP + PORTS_OPEN / 8], 0xff
    imul eax, ebx, 16
    lea rsi, [gdt + TSS_SELECTOR + rax]
    mov word ptr [rsi], TSS_IO_BITMAP + PORTS_OPEN / 8
    mov [rsi + 2], di
    mov edx, edi
    shr edx, 16
    mov [rsi + 4], dl
    mov byte ptr [rsi + 5], 0x89        // present, 64-bit TSS
    mov byte ptr [rsi + 6], 0
    mov [rsi + 7], dh
    mov qword ptr [rsi + 8], 0
    add eax, TSS_SELECTOR
    ltr ax
    ret

// Only the vectors in use get a gate; an exception nobody expects ends the guest with a line that names it.
build_idt:
    lea rsi, [exception_stubs]
    xor ecx, ecx
1:  mov rax, rsi
    mov edx, 0x8e
    call set_gate
    add rsi, 16
    inc ecx
    cmp ecx, 32
    jb 1b
    lea rsi, [gates]
2:  mov ecx, [rsi]
    mov edx, [rsi + 4]
    mov rax, [rsi + 8]
    call set_gate
    add rsi, 16
    cmp rsi, offset gates_end
    jb 2b
    ret

// rax: handler, ecx: vector, edx: type and privilege.
set_gate:
    mov edi, ecx
    shl edi, 4
    add rdi, offset idt
    mov [rdi], ax
    mov word ptr [rdi + 2], KERNEL_CS
    mov byte ptr [rdi + 4], 0
    mov [rdi + 5], dl
    shr rax, 16
    mov [rdi + 6], rax
    ret

    .code16
ap_entry:
    cli
    xor ax, ax
    mov ds, ax
    lgdtd [AP_BASE + ap_gdt_pointer - ap_entry]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .att_syntax
    ljmpl $BOOT_CS32, $ap_protected
    .intel_syntax noprefix
    .balign 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_entry_end:

    .code32
ap_protected:
    mov eax, KERNEL_DS
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ebx, 1
    lock xadd [cpus_started], ebx       // arrival order is the index
    cmp ebx, [cpus_wanted]
    jb enter_long_mode
    jmp dead32

    .data
    .globl cpus_started, cpus_wanted, multiboot_info
    .balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 4095
    .quad idt
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            // KERNEL_CS: 64-bit
    .quad 0x00cf93000000ffff            // KERNEL_DS
    .quad 0x00cf9b000000ffff            // BOOT_CS32
    .quad 0x00cff3000000ffff            // USER_DS
    .quad 0x00affb000000ffff            // USER_CS: 64-bit
    .skip 16 * MAX_CPUS                 // one TSS each
gdt_end:
multiboot_info:
    .long 0
cpus_started:
    .long 1
cpus_wanted:
    .long 1
    .balign 8
gates:
    .long VECTOR_PIT, 0x8e
    .quad on_pit
    .long VECTOR_TIMER, 0x8e
    .quad on_timer
    .long VECTOR_SERIAL, 0x8e
    .quad on_serial
    .long VECTOR_UD, 0x8e
    .quad on_syscall
    .long VECTOR_SPURIOUS, 0x8e
    .quad on_spurious
gates_end:

    .bss
    .balign 4096
pml4:               .skip 4096
pdpt:               .skip 4096
page_directories:   .skip 4096 * MAPPED_GIB
idt:                .skip 4096
kernel_stacks:      .skip STACK_BYTES * MAX_CPUS
user_stacks:        .skip STACK_BYTES * MAX_CPUS
task_states:        .skip TSS_BYTES * MAX_CPUS
    .globl cpus
cpus:               .skip CPU_BYTES * MAX_CPUS
