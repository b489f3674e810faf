// What all guests do first: parameters, memory, the clock, the timer and the other vCPUs.
#include "guest.h"
    .intel_syntax noprefix

#define MBI_CMDLINE     16
#define MBI_MMAP_LENGTH 44
#define MBI_MMAP        48
#define CMDLINE_BYTES   512
#define FOUR_GIB        0x100000000
#define PIT_HZ          1193182
#define MEASURE_TICKS   23864           // 20 ms of the PIT
#define MAX_STEP_MS     50
#define UART_FIFO_ON    0x07
#define UART_OUT2       0x0b

    .text
    .globl setup, read_clock, start_timer, start_cpus, route_interrupts, random

// vCPU 0 only, before anything else is written: the loader's data may lie in free RAM.
setup:
    call read_multiboot
    lea rbx, [parameters]
1:  call read_parameter
    add rbx, 24
    cmp rbx, offset parameters_end
    jb 1b
    mov rax, [param_cpus]
    mov [cpus_wanted], eax
    mov edx, COM1 + 2
    mov al, UART_FIFO_ON
    out dx, al
    jmp calibrate

// Copy the command line; find where RAM ends below and above 4 GiB.
read_multiboot:
    mov ebx, [multiboot_info]
    mov esi, [rbx + MBI_CMDLINE]
    lea rdi, [cmdline + 1]
    mov byte ptr [rdi - 1], ' '
    mov ecx, CMDLINE_BYTES - 2
1:  lodsb
    stosb
    test al, al
    jz 2f
    dec ecx
    jnz 1b
2:  mov esi, [rbx + MBI_MMAP]
    mov edi, [rbx + MBI_MMAP_LENGTH]
    add rdi, rsi
3:  cmp rsi, rdi
    jae 6f
    cmp dword ptr [rsi + 20], 1         // available RAM
    jne 5f
    mov rax, [rsi + 4]
    mov rdx, [rsi + 12]
    add rdx, rax
    and rdx, -4096
    mov rcx, FOUR_GIB
    cmp rax, rcx
    jae 4f
    cmp rdx, offset _end                // the range this guest lies in
    jbe 5f
    mov [low_end], rdx
    jmp 5f
4:  mov rcx, MAPPED_GIB << 30
    cmp rdx, rcx
    cmova rdx, rcx
    mov [high_end], rdx
5:  mov eax, [rsi]
    lea rsi, [rsi + rax + 4]
    jmp 3b
6:  ret

// rbx: { name with its length in 16 bytes, address of the value }. Looks for " name=digits".
read_parameter:
    lea rdx, [cmdline]
1:  cmp byte ptr [rdx], 0
    je 9f
    mov rdi, rdx
    inc rdx
    mov rsi, rbx
2:  mov al, [rsi]
    test al, al
    jz 3f
    cmp al, [rdi]
    jne 1b
    inc rsi
    inc rdi
    jmp 2b
3:  xor eax, eax
4:  movzx ecx, byte ptr [rdi]
    sub ecx, '0'
    cmp ecx, 9
    ja 5f
    imul rax, rax, 10
    add rax, rcx
    inc rdi
    jmp 4b
5:  mov rdx, [rbx + 16]
    mov [rdx], rax
9:  ret

// TSC and LAPIC timer cycles per millisecond. The lowest of three measurements: a vCPU that the host kept waiting for
// longer than the PIT takes to wrap around sees too few of its ticks, never too many.
calibrate:
    mov al, 0x34                        // counter 0, two bytes, mode 2
    out PIT_COMMAND, al
    xor eax, eax
    out PIT_COUNTER0, al
    out PIT_COUNTER0, al
    mov ebx, LAPIC
    mov dword ptr [rbx + LAPIC_DIVIDE], 0x0b
    mov dword ptr [rbx + LAPIC_LVT_TIMER], 0x10000
    mov qword ptr [tsc_khz], -1
    mov r10d, 3
1:  call measure
    cmp rax, [tsc_khz]
    cmova rax, [tsc_khz]
    cmova rdx, [lapic_khz]
    mov [tsc_khz], rax
    mov [lapic_khz], rdx
    dec r10d
    jnz 1b
    imul rax, rax, MAX_STEP_MS
    mov [max_step], rax
    ret

// rax, rdx = TSC and LAPIC timer cycles per millisecond, by 20 ms of the PIT's counter 0.
measure:
    mov dword ptr [rbx + LAPIC_INITIAL], -1
    call read_pit
    mov edi, eax
    call read_tsc
    mov rsi, rax
    mov r8d, [rbx + LAPIC_CURRENT]
1:  call read_pit
    mov ecx, edi
    sub ecx, eax
    and ecx, 0xffff
    cmp ecx, MEASURE_TICKS
    jb 1b
    mov r9d, [rbx + LAPIC_CURRENT]
    call read_tsc
    mov dword ptr [rbx + LAPIC_INITIAL], 0
    sub rax, rsi
    imul ecx, ecx, 1000
    call per_millisecond
    mov rsi, rax
    mov eax, r8d
    sub eax, r9d
    call per_millisecond
    mov rdx, rax
    mov rax, rsi
    ret

per_millisecond:                        // rax = rax * PIT_HZ / rcx
    mov edx, PIT_HZ
    mul rdx
    div rcx
    ret

read_pit:
    xor eax, eax
    out PIT_COMMAND, al                 // latch counter 0
    in al, PIT_COUNTER0
    mov edx, eax
    in al, PIT_COUNTER0
    shl eax, 8
    or eax, edx
    ret

read_tsc:
    rdtsc
    shl rdx, 32
    or rax, rdx
    ret

// rax = guest time in TSC cycles. Only differences count and each is clamped, since the TSC of the next host may
// be anywhere.
read_clock:
    call read_tsc
    mov rdx, rax
    sub rdx, [r14 + CPU_TSC]
    mov [r14 + CPU_TSC], rax
    xor eax, eax
    test rdx, rdx
    cmovs rdx, rax
    cmp rdx, [max_step]
    cmova rdx, [max_step]
    mov rax, [r14 + CPU_CLOCK]
    add rax, rdx
    mov [r14 + CPU_CLOCK], rax
    ret

// This vCPU's LAPIC timer, periodic at param_hz.
start_timer:
    mov rax, [lapic_khz]
    imul rax, rax, 1000
    xor edx, edx
    div qword ptr [param_hz]
    mov ecx, LAPIC
    mov dword ptr [rcx + LAPIC_DIVIDE], 0x0b
    mov dword ptr [rcx + LAPIC_LVT_TIMER], 0x20000 | VECTOR_TIMER
    mov [rcx + LAPIC_INITIAL], eax
    call read_tsc
    mov [r14 + CPU_TSC], rax
    ret

// INIT and SIPI to all others, then wait until param_cpus run; they draw their index in order of arrival.
start_cpus:
    cmp qword ptr [param_cpus], 1
    jbe 9f
    mov ebx, LAPIC
    mov dword ptr [rbx + LAPIC_ICR_HIGH], 0
    mov dword ptr [rbx + LAPIC_ICR_LOW], 0xc4500
    mov ecx, 10
    call wait_ms
    mov dword ptr [rbx + LAPIC_ICR_LOW], 0xc4608
    mov ecx, 5000
1:  mov eax, [cpus_started]
    cmp eax, [cpus_wanted]
    jae 9f
    push rcx
    mov ecx, 1
    call wait_ms
    pop rcx
    dec ecx
    jnz 1b
    mov eax, [cpus_started]
    mov ebx, [cpus_wanted]
    lea rsi, [text_cpus]
    jmp fail
9:  ret

wait_ms:
    imul rcx, [tsc_khz]
    call read_tsc
    mov rsi, rax
1:  pause
    call read_tsc
    sub rax, rsi
    cmp rax, rcx
    jb 1b
    ret

// The PIT at 100 Hz through the PIC and LINT0, the UART's receive interrupt through IOAPIC pin 4.
// LINT0 stays masked until the PIC has its vectors: ICW1 opens all its lines, and the PIT runs already.
route_interrupts:
    mov eax, LAPIC
    mov dword ptr [rax + LAPIC_LVT_LINT0], 0x10700
    lea rsi, [pic_setup]
1:  movzx edx, byte ptr [rsi]
    mov al, [rsi + 1]
    out dx, al
    add rsi, 2
    cmp rsi, offset pic_setup_end
    jb 1b
    mov eax, LAPIC
    mov dword ptr [rax + LAPIC_LVT_LINT0], 0x700
    mov ebx, IOAPIC
    mov dword ptr [rbx], 0x10 + 2 * 4 + 1       // redirection of pin 4, high half: to LAPIC 0
    mov dword ptr [rbx + 16], 0
    mov dword ptr [rbx], 0x10 + 2 * 4
    mov dword ptr [rbx + 16], VECTOR_SERIAL
    mov edx, COM1 + 4
    mov al, UART_OUT2
    out dx, al
    mov edx, COM1 + 1
    mov al, 1                           // receive interrupt
    out dx, al
    ret

// rax = the next number of xorshift64 in r13.
random:
    mov rax, r13
    shl rax, 13
    xor r13, rax
    mov rax, r13
    shr rax, 7
    xor r13, rax
    mov rax, r13
    shl rax, 17
    xor r13, rax
    mov rax, r13
    ret

    .data
    .macro parameter name, default
    .globl param_\name
    .data 1
    .balign 8
param_\name: .quad \default
    .data 0
1:  .ascii " \name="
    .skip 16 - (. - 1b)
    .quad param_\name
    .endm

    .balign 8
parameters:
    parameter cpus, 1                   // vCPUs to use
    parameter hz, 1000                  // LAPIC timer interrupts per second
    parameter beat, 0                   // milliseconds between two heartbeats; 0: 1 in idle and writer, 5 in ledger
    parameter fill, 0                   // MiB of data that stays as it is
    parameter kind, 0                   // of that data: 0 incompressible, 1 like a text, 2 every second page zero
    parameter hot, 0                    // writer: MiB that are written again and again
    parameter speed, 0                  // writer: MiB written per second; 0: as many as it can
    parameter pages, 1024               // pages under the ledger
    parameter rate, 20                  // updates per millisecond and vCPU; 0: as many as it can
    parameter beats, 0                  // power off after that many heartbeats of vCPU 0; 0: never
    parameter seconds, 0                // power off after that much guest time; 0: never
    parameter irq, 0                    // 1: PIT and UART interrupts, echo lines
    parameter state, 0                  // 1: known MSRs, debug registers, CR2, CR8
    parameter ymm, 0                    // 1: known upper halves of YMM registers
parameters_end:
pic_setup:                              // port, value: vectors 0x20 and 0x28, only IRQ 0 open; PIT mode 2, 100 Hz
    .byte 0x20, 0x11, 0x21, VECTOR_PIT, 0x21, 4, 0x21, 1, 0x21, 0xfe
    .byte 0xa0, 0x11, 0xa1, VECTOR_PIT + 8, 0xa1, 2, 0xa1, 1, 0xa1, 0xff
    .byte PIT_COMMAND, 0x34, PIT_COUNTER0, 11932 & 0xff, PIT_COUNTER0, 11932 >> 8
pic_setup_end:
text_cpus:
    .asciz "vcpus did not start: started, wanted,"

    .bss
    .balign 8
    .globl tsc_khz, low_end, high_end
tsc_khz:    .skip 8
lapic_khz:  .skip 8
max_step:   .skip 8
low_end:    .skip 8
high_end:   .skip 8
cmdline:    .skip CMDLINE_BYTES
