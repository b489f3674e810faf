// The guest for speed figures: data in `fill` MiB, then sleep; one heartbeat per timer interrupt.
//
// Prints `H <vcpu> <seq>`: short, so that it costs nearly no CPU.
#include "guest.h"
    .intel_syntax noprefix
    .text
    .globl guest_main
guest_main:
    cmp qword ptr [r14 + CPU_INDEX], 0
    jne 1f
    call setup
    xor eax, eax
    mov [param_pages], rax
    call place_pages
    call fill_memory
    mov ecx, 1                          // one wake per heartbeat
    call wake_by_beat
    mov dword ptr [ready], 1
    call start_cpus
1:  call start_timer
    xor ebp, ebp
    xor r15d, r15d
2:  mov eax, SYS_WAIT
    ud2
    call send_heartbeat
    cmp rbp, [param_beats]
    jne 2b
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
