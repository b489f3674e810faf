// Constants in registers that nothing may change: xmm4 to xmm13, their upper halves, st(0), MXCSR, the x87 control
// word, and r15 against xmm15.
#include "guest.h"
    .intel_syntax noprefix

#define MXCSR           0x3fa0          // round down, precision flag set, all masked
#define X87_CONTROL     0x0b7f          // round up

    .text
    .globl load_registers, check_registers

load_registers:
    movdqu xmm14, [two_ones]
    pxor xmm15, xmm15
    .irp n, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    movdqu xmm\n, [xmm_values + (\n - 4) * 16]
    .endr
    cmp qword ptr [param_ymm], 0
    je 1f
    .irp n, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    vinsertf128 ymm\n, ymm\n, [xmm_values + (13 - \n) * 16], 1
    .endr
1:  fninit
    fldpi
    fldcw [x87_control]
    ldmxcsr [mxcsr]
    ret

check_registers:
    .irp n, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    mov ecx, \n
    movdqu xmm0, [xmm_values + (\n - 4) * 16]
    pcmpeqd xmm0, xmm\n
    pmovmskb eax, xmm0
    cmp eax, 0xffff
    jne bad_xmm
    .endr
    cmp qword ptr [param_ymm], 0
    je 1f
    .irp n, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    mov ecx, \n + 100
    movdqu xmm1, [xmm_values + (13 - \n) * 16]
    vextractf128 xmm0, ymm\n, 1
    pcmpeqd xmm0, xmm1
    pmovmskb eax, xmm0
    cmp eax, 0xffff
    jne bad_xmm
    .endr
1:  movq rax, xmm15
    mov rbx, r15
    mov ecx, 15
    cmp rax, rbx
    jne bad_total
    movhlps xmm0, xmm15
    movq rax, xmm0
    cmp rax, rbx
    jne bad_total
    movq rax, xmm14
    mov ebx, 1
    mov ecx, 14
    cmp rax, rbx
    jne bad_total
    stmxcsr [r14 + CPU_SCRATCH]
    mov eax, [r14 + CPU_SCRATCH]
    mov ebx, [mxcsr]
    cmp eax, ebx
    jne bad_control
    fnstcw [r14 + CPU_SCRATCH]
    movzx eax, word ptr [r14 + CPU_SCRATCH]
    movzx ebx, word ptr [x87_control]
    cmp eax, ebx
    jne bad_control
    fst qword ptr [r14 + CPU_SCRATCH]
    mov rax, [r14 + CPU_SCRATCH]
    mov rbx, [pi]
    xor ecx, ecx
    cmp rax, rbx
    jne bad_control
    ret

bad_xmm:
    mov ebx, 0xffff
    lea rsi, [text_xmm]
    jmp fail
bad_total:
    lea rsi, [text_total]
    jmp fail
bad_control:
    lea rsi, [text_control]
    jmp fail

    .data
    .balign 16
two_ones:   .quad 1, 1
xmm_values:
    .irp n, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    .quad 0x0123456789abcdef * \n, ~(0xfedcba9876543 * \n)
    .endr
mxcsr:          .long MXCSR
x87_control:    .word X87_CONTROL
    .balign 8
pi:             .quad 0x400921fb54442d19        // pi rounded up
text_xmm:       .asciz "xmm register changed: equal bytes found, expected, number (100 more: upper half),"
text_total:     .asciz "xmm register and counter differ: found, expected, xmm number,"
text_control:   .asciz "floating point state changed: found, expected,"
