// Ring 0: exceptions, interrupts and the three system calls. Short, since it may be interpreted.
#include "guest.h"
    .intel_syntax noprefix
    .text

// One 16-byte stub per exception: push an error code where the CPU does not, push the vector.
    .balign 16
    .globl exception_stubs
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if (vector != 8) && (vector < 10 || vector > 14) && (vector != 17) && (vector != 21)
    push 0
    .endif
    push vector
    jmp on_exception
    .set vector, vector + 1
    .endr

not_a_syscall:
    push 0
    push VECTOR_UD
on_exception:
    pop rax                             // vector
    pop rbx                             // error code
    pop rcx                             // rip
    lea r14, [exception_block]          // the output lock may be held by whoever faulted
    mov dword ptr [output_lock], 0
    lea rsi, [text_exception]
    jmp fail

    .globl on_timer, on_pit, on_serial, on_spurious, on_syscall
on_timer:
    push rax
    mov eax, LAPIC
    mov dword ptr [rax + LAPIC_EOI], 0
    pop rax
    iretq

on_pit:
    push rax
    inc qword ptr [pit_ticks]
    mov al, 0x20
    out 0x20, al
    pop rax
    iretq

// The IOAPIC pin is edge triggered: the line falls only when the UART has nothing left, so read until then.
on_serial:
    push rax
    push rdx
    push rcx
1:  mov edx, COM1 + 5
    in al, dx
    test al, 1
    jz 2f
    mov edx, COM1
    in al, dx
    movzx ecx, byte ptr [received_head]
    mov [received + rcx], al
    inc byte ptr [received_head]
    jmp 1b
2:  mov eax, LAPIC
    mov dword ptr [rax + LAPIC_EOI], 0
    pop rcx
    pop rdx
    pop rax
on_spurious:
    iretq

on_syscall:
    add qword ptr [rsp], 2              // past the UD2
    cmp eax, SYS_SET_STATE
    je set_state
    cmp eax, SYS_CHECK_STATE
    je check_state
    cmp eax, SYS_ENABLE_YMM
    je enable_ymm
    cmp eax, SYS_WAIT
    jne not_a_syscall
    sti
    hlt
    iretq

enable_ymm:
    mov rax, cr4
    or eax, 0x40000
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 7
    xsetbv
    iretq

set_state:
    lea rsi, [known_msrs]
1:  mov ecx, [rsi]
    mov eax, [rsi + 8]
    mov edx, [rsi + 12]
    wrmsr
    add rsi, 16
    cmp rsi, offset known_msrs_end
    jb 1b
    lea rsi, [known_registers]
    mov rax, [rsi]
    mov dr0, rax
    mov rax, [rsi + 8]
    mov dr1, rax
    mov rax, [rsi + 16]
    mov dr2, rax
    mov rax, [rsi + 24]
    mov dr3, rax
    mov rax, [rsi + 32]
    mov dr7, rax
    mov rax, [rsi + 40]
    mov cr2, rax
    mov rax, [rsi + 48]
    mov cr8, rax
    iretq

// Items are numbered by MSR index, then 0 to 6 for DR0 to DR3, DR7, CR2 and CR8, plus one.
check_state:
    lea rsi, [known_msrs]
1:  mov ecx, [rsi]
    rdmsr
    shl rdx, 32
    lea rbx, [rdx + rax]
    mov eax, [rsi]
    mov rcx, [rsi + 8]
    cmp rbx, rcx
    jne 9f
    add rsi, 16
    cmp rsi, offset known_msrs_end
    jb 1b
    lea rsi, [known_registers]
    xor eax, eax
    .irp register, dr0, dr1, dr2, dr3, dr7, cr2, cr8
    inc eax
    mov rbx, \register
    mov rcx, [rsi]
    add rsi, 8
    cmp rbx, rcx
    jne 9f
    .endr
    xor eax, eax
9:  iretq

    .data
    .balign 8
// Nothing here uses SYSCALL, SYSENTER, FS or GS; the addresses are only canonical.
known_msrs:
    .quad 0xc0000081, 0x0023001000000000    // STAR
    .quad 0xc0000082, 0x00007a0011112220    // LSTAR
    .quad 0xc0000083, 0x00007a0033334440    // CSTAR
    .quad 0xc0000084, 0x0000000000047700    // FMASK
    .quad 0xc0000100, 0x0000555511110000    // FS_BASE
    .quad 0xc0000101, 0x0000555522220000    // GS_BASE
    .quad 0xc0000102, 0x0000555533330000    // KERNEL_GS_BASE
    .quad 0x277,      0x0007010600070106    // PAT
    .quad 0x174,      0x0000000000000008    // SYSENTER_CS
    .quad 0x175,      0x00007a0055556660    // SYSENTER_ESP
    .quad 0x176,      0x00007a0077778880    // SYSENTER_EIP
known_msrs_end:
known_registers:
    .quad 0x0000123400001000, 0x0000123400002000, 0x0000123400003000, 0x0000123400004000
    .quad 0x455                             // DR7: four execution breakpoints where no code is
    .quad 0x0000432100005678                // CR2
    .quad 1                                 // CR8: blocks nothing that is used
text_exception:
    .asciz "exception: vector, error code, rip"

    .bss
    .balign 8
    .globl pit_ticks, received, received_head
pit_ticks:          .skip 8
received_head:      .skip 8
received:           .skip 256
exception_block:    .skip CPU_BYTES
