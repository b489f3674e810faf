// The guest that notices a lost byte: it updates random pages for ever and checks all of it, see pages.S.
//
// Prints `H <vcpu> <seq> <microseconds> <updates>` every `beat` ms of guest time, `OK updates <n> tickets <n>` at
// the end, or one line `BAD …`. With irq=1 a line received on COM1 comes back as `E <line>`, and `stop` ends it.
#include "guest.h"
    .intel_syntax noprefix

#define UPDATES_AT_ONCE 256             // with rate=0, between two looks at the clock
#define MAX_TICK_GAP_MS 1000
#define CHECK_STATE_EVERY 16            // heartbeats

    .text
    .globl guest_main
guest_main:
    cmp qword ptr [r14 + CPU_INDEX], 0
    jne 1f
    call setup
    cmp qword ptr [param_beat], 0
    jne 4f
    mov qword ptr [param_beat], 5
4:  call place_pages
    call fill_memory
    cmp qword ptr [param_irq], 0
    je 1f
    call route_interrupts
1:  mov rax, [param_pages]              // own pages: [pages * index / cpus, pages * (index + 1) / cpus)
    mul qword ptr [r14 + CPU_INDEX]
    div qword ptr [param_cpus]
    mov [r14 + CPU_FIRST], rax
    mov rax, [r14 + CPU_INDEX]
    inc rax
    mul qword ptr [param_pages]
    div qword ptr [param_cpus]
    mov [r14 + CPU_END], rax
    mov r13, [r14 + CPU_INDEX]
    add r13, 0x2545f491
    xor r12d, r12d
    xor ebp, ebp
    xor r15d, r15d
    cmp qword ptr [param_ymm], 0
    je 2f
    mov eax, SYS_ENABLE_YMM
    ud2
2:  call load_registers
    call init_pages
    cmp qword ptr [param_state], 0
    je 2f
    mov eax, SYS_SET_STATE
    ud2
2:  cmp qword ptr [r14 + CPU_INDEX], 0
    jne 3f
    call start_cpus
3:  call start_timer

main_loop:
    cmp dword ptr [stop], 0
    jne finish
    call read_clock
    cmp rax, [r14 + CPU_NEXT_BEAT]
    jb 1f
    call heartbeat
1:  cmp qword ptr [param_rate], 0
    je work
    mov rcx, [r14 + CPU_CLOCK]          // even if the line took so long that the next heartbeat is due
    cmp rcx, [r14 + CPU_NEXT_WRITE]
    jae timed_work
    cmp rcx, [r14 + CPU_NEXT_BEAT]
    jae main_loop
    mov eax, SYS_WAIT
    ud2
    jmp main_loop

// rcx = now.
timed_work:
    mov rax, [tsc_khz]
    xor edx, edx
    div qword ptr [param_rate]
    add rax, [r14 + CPU_NEXT_WRITE]
    call limit_backlog
    mov [r14 + CPU_NEXT_WRITE], rax
    call update_and_check
    jmp 1b
work:
    push UPDATES_AT_ONCE
2:  call update_and_check
    dec qword ptr [rsp]
    jnz 2b
    pop rax
    jmp main_loop

update_and_check:
    call draw_ticket
    call update_random_page
    jmp check_next_page

// The page that all vCPUs share: its counter never goes back.
draw_ticket:
    mov eax, 1
    lock xadd [shared_counter], rax
    inc qword ptr [r14 + CPU_SHARED]
    mov rbx, r12
    cmp rax, rbx
    jb 1f
    lea r12, [rax + 1]
    ret
1:  lea rcx, [shared_counter]
    lea rsi, [text_ticket]
    jmp fail

// One page under the ledger and, on vCPU 0, one filled page; after each whole pass the ledger's sum.
check_next_page:
    mov rbx, [r14 + CPU_CURSOR]
    cmp rbx, [r14 + CPU_END]
    jb 1f
    call check_ledger_sum
    call check_registers
    mov rbx, [r14 + CPU_FIRST]
    mov [r14 + CPU_CURSOR], rbx
1:  inc qword ptr [r14 + CPU_CURSOR]
    call check_page
    cmp qword ptr [r14 + CPU_INDEX], 0
    je check_next_fill_page
    ret

// rax = now.
heartbeat:
    call next_beat
    call check_registers
    call check_state_sometimes
    call print_heartbeat
    cmp qword ptr [r14 + CPU_INDEX], 0
    jne 3f
    cmp qword ptr [param_irq], 0
    je 1f
    call check_ticks
    call echo
1:  cmp rbp, [param_beats]
    je 2f
    imul rax, [param_seconds], 1000
    test rax, rax
    jz 3f
    mul qword ptr [tsc_khz]
    cmp [r14 + CPU_CLOCK], rax
    jb 3f
2:  mov dword ptr [stop], 1
3:  ret

print_heartbeat:
    call begin_heartbeat
    mov rax, [r14 + CPU_CLOCK]
    mov ecx, 1000
    mul rcx
    div qword ptr [tsc_khz]
    call put_decimal
    mov rax, r15
    call put_decimal
    jmp line_end

check_state_sometimes:
    test rbp, CHECK_STATE_EVERY - 1
    jnz 1f
    cmp qword ptr [param_state], 0
    je 1f
    mov eax, SYS_CHECK_STATE
    ud2
    test eax, eax
    jz 1f
    mov edx, eax
    mov rax, rbx
    mov rbx, rcx
    mov ecx, edx
    lea rsi, [text_state]
    jmp fail
1:  ret

// The PIT must go on: no MAX_TICK_GAP_MS of guest time without a tick.
check_ticks:
    mov rbx, [r14 + CPU_CLOCK]
    mov rax, [pit_ticks]
    cmp rax, [r14 + CPU_TICKS]
    je 1f
    mov [r14 + CPU_TICKS], rax
    mov [r14 + CPU_TICK_CLOCK], rbx
    ret
1:  imul rcx, [tsc_khz], MAX_TICK_GAP_MS
    add rcx, [r14 + CPU_TICK_CLOCK]
    cmp rbx, rcx
    jbe 2f
    lea rsi, [text_ticks]
    jmp fail
2:  ret

// Send back every whole line that the interrupt handler has received.
echo:
    movzx ebx, byte ptr [received_tail]
    mov edx, ebx
1:  cmp dl, [received_head]
    je 3f
    cmp byte ptr [received + rdx], 10
    je 2f
    inc dl
    jmp 1b
2:  call line_begin
    mov word ptr [rdi], 0x2045          // "E "
    add rdi, 2
4:  mov al, [received + rbx]
    inc bl
    cmp al, 10
    je 5f
    stosb
    jmp 4b
5:  mov [received_tail], bl
    cmp dword ptr [r14 + CPU_LINE + 2], 0x706f7473      // "stop"
    jne 6f
    mov dword ptr [stop], 1
6:  call line_end
    jmp echo
3:  ret

// Each vCPU checks all it owns and says what it did; vCPU 0 adds up and ends the guest.
finish:
    mov rbx, [r14 + CPU_FIRST]
1:  cmp rbx, [r14 + CPU_END]
    jae 2f
    push rbx
    call check_page
    pop rbx
    inc rbx
    jmp 1b
2:  call check_ledger_sum
    call check_registers
    mov [r14 + CPU_UPDATES], r15
    mov qword ptr [r14 + CPU_DONE], 1
    cmp qword ptr [r14 + CPU_INDEX], 0
    je 4f
3:  mov eax, SYS_WAIT
    ud2
    jmp 3b
4:  xor eax, eax
    xor ecx, ecx
    lea rsi, [cpus]
    mov rdx, [param_cpus]
5:  pause
    cmp qword ptr [rsi + CPU_DONE], 1
    jne 5b
    add rax, [rsi + CPU_UPDATES]
    add rcx, [rsi + CPU_SHARED]
    add rsi, CPU_BYTES
    dec rdx
    jnz 5b
    mov rbx, rcx
    mov r15, rax
    mov rax, [shared_counter]
    lea rcx, [shared_counter]
    lea rsi, [text_shared]
    cmp rax, rbx
    jne fail
    call line_begin
    lea rsi, [text_ok]
    call put_string
    mov rax, r15
    call put_decimal
    lea rsi, [text_tickets]
    call put_string
    mov rax, [shared_counter]
    call put_decimal
    call line_end
    jmp power_off

    .data
    .balign 4
stop:           .long 0
text_ok:        .asciz "OK updates"
text_tickets:   .asciz " tickets"
text_ticket:    .asciz "shared counter went back: found, at least, gpa,"
text_shared:    .asciz "shared counter is not what the vcpus drew: found, expected, gpa,"
text_state:     .asciz "state changed: found, expected, msr (1 to 7: dr0 to dr3, dr7, cr2, cr8),"
text_ticks:     .asciz "the pit has stopped: ticks, guest time now, limit,"

    .bss
    .balign 4096
shared_counter: .skip 4096
received_tail:  .skip 8
