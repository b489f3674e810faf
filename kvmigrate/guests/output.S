// Lines on COM1, and the two ways a guest ends.
//
// A line is built at rdi, in the vCPU's own buffer, and goes out as a whole under a lock.
#include "guest.h"
    .intel_syntax noprefix
    .text
    .globl line_begin, line_end, put_string, put_decimal, put_hex, fail, power_off

line_begin:
    lea rdi, [r14 + CPU_LINE]
    ret

// Append the zero-terminated string at rsi.
put_string:
    lodsb
    test al, al
    jz 1f
    stosb
    jmp put_string
1:  ret

// Append a space and rax in decimal.
put_decimal:
    mov byte ptr [rdi], ' '
    inc rdi
    mov ecx, 10
    xor r8d, r8d
1:  xor edx, edx
    div rcx
    add edx, '0'
    push rdx
    inc r8d
    test rax, rax
    jnz 1b
2:  pop rax
    stosb
    dec r8d
    jnz 2b
    ret

// Append a space and rax in hexadecimal, 16 digits.
put_hex:
    mov byte ptr [rdi], ' '
    inc rdi
    mov rdx, rax
    mov ecx, 16
1:  rol rdx, 4
    mov eax, edx
    and eax, 15
    cmp eax, 10
    jb 2f
    add eax, 'a' - '0' - 10
2:  add eax, '0'
    stosb
    dec ecx
    jnz 1b
    ret

// Send the line that ends at rdi. THRE says that the FIFO is empty, so 16 bytes may follow each time.
line_end:
    mov byte ptr [rdi], 10
    inc rdi
1:  mov eax, 1
    xchg eax, [output_lock]
    test eax, eax
    jz 2f
    mov eax, SYS_WAIT                   // until the next timer interrupt: spinning would take time from the holder
    ud2
    jmp 1b
2:  lea rsi, [r14 + CPU_LINE]
3:  mov edx, COM1 + 5
    in al, dx
    test al, 0x20
    jz 3b
    mov edx, COM1
    mov ecx, 16
4:  cmp rsi, rdi
    jae 5f
    lodsb
    out dx, al
    dec ecx
    jnz 4b
    jmp 3b
5:  mov dword ptr [output_lock], 0
    ret

// One line `BAD <text at rsi>: <rax> <rbx> <rcx> vcpu <n> updates <r15>`, then isa-debug-exit with status 3.
fail:
    push rcx
    push rbx
    push rax
    push rsi
    call line_begin
    lea rsi, [text_bad]
    call put_string
    pop rsi
    call put_string
    .rept 3
    pop rax
    call put_hex
    .endr
    lea rsi, [text_vcpu]
    call put_string
    mov rax, [r14 + CPU_INDEX]
    call put_decimal
    lea rsi, [text_updates]
    call put_string
    mov rax, r15
    call put_decimal
    call line_end
    mov edx, DEBUG_EXIT
    mov al, 1
    out dx, al
1:  jmp 1b

power_off:
    mov edx, POWER_OFF
    mov eax, SLP_EN
    out dx, ax
1:  jmp 1b

    .data
    .globl output_lock
    .balign 4
output_lock:    .long 0
text_bad:       .asciz "BAD "
text_vcpu:      .asciz " vcpu"
text_updates:   .asciz " updates"
