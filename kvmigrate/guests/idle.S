// The guest for speed figures: data in `fill` MiB, then sleep; one heartbeat per timer interrupt.
//
// Prints `H <vcpu> <seq>`: short, so that it costs nearly no CPU.
#include "guest.h"
    .intel_syntax noprefix
    .text
    .globl guest_main
guest_main:
    cmp qword ptr [r14 + CPU_INDEX], 0
    jne 2f
    call setup
    xor eax, eax
    mov [param_pages], rax
    call place_pages
    call fill_memory
    cmp qword ptr [param_beat], 0
    jne 1f
    mov qword ptr [param_beat], 1
1:  mov rax, 1000                       // one wake per heartbeat
    xor edx, edx
    div qword ptr [param_beat]
    mov [param_hz], rax
    mov dword ptr [ready], 1
    call start_cpus
2:  call start_timer
    xor ebp, ebp
    xor r15d, r15d
3:  mov eax, SYS_WAIT
    ud2
    inc rbp
    call line_begin
    mov byte ptr [rdi], 'H'
    inc rdi
    mov rax, [r14 + CPU_INDEX]
    call put_decimal
    mov rax, rbp
    call put_decimal
    call line_end
    cmp rbp, [param_beats]
    jne 3b
    call line_begin
    lea rsi, [text_ok]
    call put_string
    mov rax, rbp
    call put_decimal
    call line_end
    jmp power_off

    .data
    .balign 4
ready:      .long 0
text_ok:    .asciz "OK beats"
