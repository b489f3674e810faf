// Heartbeats: how often they come, when the next one is due, and the line `H <vcpu> <seq>`.
#include "guest.h"
    .intel_syntax noprefix

#define MAX_BACKLOG_MS  50              // work missed for longer than this is not made up for

    .text
    .globl wake_by_beat, next_beat, limit_backlog, begin_heartbeat, send_heartbeat

// The timer is to interrupt ecx times per heartbeat; those come every millisecond unless `beat` was given.
wake_by_beat:
    cmp qword ptr [param_beat], 0
    jne 1f
    mov qword ptr [param_beat], 1
1:  imul eax, ecx, 1000
    xor edx, edx
    div qword ptr [param_beat]
    mov [param_hz], rax
    ret

// rax = now, when a heartbeat is due: set the time of the one after it.
next_beat:
    mov rcx, rax
    mov rax, [tsc_khz]
    mul qword ptr [param_beat]
    add rax, [r14 + CPU_NEXT_BEAT]
    call limit_backlog
    mov [r14 + CPU_NEXT_BEAT], rax
    ret

// rax = when the next thing is due, rcx = now: no further back than MAX_BACKLOG_MS.
limit_backlog:
    imul rdx, [tsc_khz], MAX_BACKLOG_MS
    sub rcx, rdx
    cmp rax, rcx
    cmovl rax, rcx
    ret

// Count a heartbeat and begin its line.
begin_heartbeat:
    inc rbp
    call line_begin
    mov byte ptr [rdi], 'H'
    inc rdi
    mov rax, [r14 + CPU_INDEX]
    call put_decimal
    mov rax, rbp
    jmp put_decimal

send_heartbeat:
    call begin_heartbeat
    jmp line_end
