// The guest for speed figures under load: `hot` MiB that are written over and over, `speed` MiB of them per second.
//
// Prints `H <vcpu> <seq>` every `beat` ms of guest time, and at the end `OK writes <pages>` or one line `BAD …`. A hot
// page holds xorshift64 from its address and the number of the pass, its last word once more its first one; before it
// is written again both must be those of the pass before. With each heartbeat one filled page is checked, at the end
// all of them and all hot ones. One vCPU.
//
//   r12  next hot page               r13  passes that are complete
#include "guest.h"
    .intel_syntax noprefix

#define WAKES_PER_BEAT  2
#define HOT_KEY         0x9e3779b97f4a7c15
#define PASS_SHIFT      40              // above every address
#define LAST_WORD       4088

    .text
    .globl guest_main
guest_main:
    call setup
    xor eax, eax
    mov [param_pages], rax
    call place_pages
    call fill_memory
    mov ecx, WAKES_PER_BEAT
    call wake_by_beat
    mov rax, [param_hot]
    shl rax, 8
    mov [hot_pages], rax
    mov rbx, [param_speed]
    test rbx, rbx
    jz 1f
    shl rbx, 8                          // pages per second
    imul rax, [tsc_khz], 1000
    xor edx, edx
    div rbx
    mov [cycles_per_page], rax
1:  call start_timer
    xor ebp, ebp
    xor r12d, r12d
    xor r13d, r13d
    xor r15d, r15d

main_loop:
    call read_clock
    cmp rax, [r14 + CPU_NEXT_BEAT]
    jb 1f
    call heartbeat
1:  cmp qword ptr [hot_pages], 0
    je 3f
    cmp qword ptr [param_speed], 0
    je 2f
    mov rcx, [r14 + CPU_CLOCK]
    mov rax, [r14 + CPU_NEXT_WRITE]
    cmp rcx, rax
    jb 3f
    add rax, [cycles_per_page]
    call limit_backlog
    mov [r14 + CPU_NEXT_WRITE], rax
2:  call write_next_page
    jmp main_loop
3:  mov eax, SYS_WAIT
    ud2
    jmp main_loop

// rax = now.
heartbeat:
    call next_beat
    call send_heartbeat
    cmp rbp, [param_beats]
    je finish
    jmp check_next_fill_page

// rdi = address of hot page rcx.
hot_page_address:
    add rcx, [fill_pages]
    jmp fill_page_address

// rdx = the first word of the hot page at rdi in pass rbx.
first_word:
    mov rdx, HOT_KEY
    xor rdx, rdi
    mov rax, rbx
    shl rax, PASS_SHIFT
    xor rdx, rax
    jmp fill_step

write_next_page:
    mov rcx, r12
    call hot_page_address
    mov rbx, r13
    test rbx, rbx
    jz 1f                               // in the first pass nothing is there yet
    call first_word
    cmp [rdi], rdx
    jne changed
    cmp [rdi + LAST_WORD], rdx
    jne changed
1:  inc rbx
    call first_word
    mov r8, rdx
    lea rsi, [rdi + LAST_WORD]
2:  mov [rdi], rdx
    call fill_step
    add rdi, 8
    cmp rdi, rsi
    jb 2b
    mov [rdi], r8
    inc r15
    inc r12
    cmp r12, [hot_pages]
    jb 3f
    xor r12d, r12d
    inc r13
3:  ret

// All words of the hot page at rdi against pass rbx.
check_hot_page:
    call first_word
    mov r8, rdx
    lea rsi, [rdi + LAST_WORD]
1:  cmp [rdi], rdx
    jne changed
    call fill_step
    add rdi, 8
    cmp rdi, rsi
    jb 1b
    mov rdx, r8
    cmp [rdi], rdx
    jne changed
    ret

changed:
    mov rax, [rdi]
    mov rbx, rdx
    mov rcx, rdi
    lea rsi, [text_hot]
    jmp fail

finish:
    xor r11d, r11d
1:  cmp r11, [fill_pages]
    jae 2f
    mov rcx, r11
    call check_fill_page
    inc r11
    jmp 1b
2:  xor r11d, r11d
3:  cmp r11, [hot_pages]
    jae 4f
    mov rcx, r11
    call hot_page_address
    cmp r11, r12                        // pages before the next one are a pass ahead
    mov rbx, r13
    adc rbx, 0
    jz 5f
    call check_hot_page
5:  inc r11
    jmp 3b
4:  call line_begin
    lea rsi, [text_ok]
    call put_string
    mov rax, r15
    call put_decimal
    call line_end
    jmp power_off

    .data
text_ok:    .asciz "OK writes"
text_hot:   .asciz "hot page changed: found, expected, gpa,"

    .bss
    .balign 8
hot_pages:          .skip 8
cycles_per_page:    .skip 8
