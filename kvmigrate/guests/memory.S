// Where the pages under the ledger lie, and the incompressible data.
//
// The ledger starts at _end; its entry p is { seq, gpa } of page p. The pages lie in two or three runs, so that
// both ends of RAM are under test: right after the ledger, at the end of RAM below 4 GiB, at the end of RAM above.
// What is left between them is for the incompressible data.
#include "guest.h"
    .intel_syntax noprefix

#define FOUR_GIB        0x100000000
#define FILL_KEY        0x9e3779b97f4a7c15
#define KIND_TEXT       1
#define KIND_HALF_ZERO  2

    .text
    .globl place_pages, fill_memory, check_fill_page, check_next_fill_page, fill_page_address, fill_step

place_pages:
    mov rcx, [param_pages]
    mov rsi, offset _end
    mov [ledger], rsi
    mov rax, rcx
    shl rax, 4
    lea rsi, [rsi + rax + 4095]
    and rsi, -4096                      // first run starts here
    mov rax, rcx
    xor edx, edx
    mov ebx, 2
    cmp qword ptr [high_end], 0
    je 1f
    inc ebx
1:  div rbx
    mov rbx, rax                        // pages in each run but the last
    xor r8d, r8d                        // page index
    mov rdi, rsi
    mov r9, rbx
    call place_run
    mov [fill_low], rdi
    mov r9, rcx
    sub r9, r8
    cmp qword ptr [high_end], 0
    cmovne r9, rbx
    mov rax, r9
    shl rax, 12
    mov rdx, [low_end]
    sub rdx, rax
    cmp rdx, rdi
    jl too_small
    mov [fill_low_end], rdx
    mov rdi, rdx
    call place_run
    mov r9, rcx
    sub r9, r8
    mov rax, r9
    shl rax, 12
    mov rdi, [high_end]
    test rdi, rdi
    jz 2f
    sub rdi, rax
    mov rax, FOUR_GIB
    mov [fill_high], rax
    mov [fill_high_end], rdi
    cmp rdi, rax
    jl too_small
    call place_run
2:  ret

// Ledger entries for r9 pages from rdi; r8 counts all.
place_run:
    mov rsi, r8
    shl rsi, 4
    add rsi, [ledger]
1:  test r9, r9
    jz 2f
    mov qword ptr [rsi], 0
    mov [rsi + 8], rdi
    add rsi, 16
    add rdi, 4096
    inc r8
    dec r9
    jmp 1b
2:  ret

too_small:
    mov rax, [param_pages]
    mov rbx, [low_end]
    mov rcx, [high_end]
    lea rsi, [text_memory]
    jmp fail

// `fill` MiB of data of the kind that `kind` names, from low RAM upwards.
fill_memory:
    mov rbx, [param_fill]
    shl rbx, 8
    mov [fill_pages], rbx
    xor ecx, ecx
1:  cmp rcx, rbx
    jae 3f
    call fill_page_address
    mov rdx, FILL_KEY
    xor rdx, rdi
    lea rsi, [rdi + 4096]
2:  call fill_word
    mov [rdi], rax
    add rdi, 8
    cmp rdi, rsi
    jb 2b
    inc rcx
    jmp 1b
3:  ret

// rdi = address of fill page rcx.
fill_page_address:
    mov rdi, rcx
    shl rdi, 12
    add rdi, [fill_low]
    mov rax, [fill_low_end]
    sub rax, rdi
    ja 1f
    mov rdi, [fill_high]
    sub rdi, rax
    cmp rdi, [fill_high_end]
    jae too_small
1:  ret

// rax = what belongs at rdi; rdx, the generator's state, goes one on.
fill_word:
    call fill_step
    mov rax, rdx
    cmp qword ptr [param_kind], KIND_TEXT
    je 1f
    jb 9f
    test edi, 4096                      // KIND_HALF_ZERO: every second page was written, with zeros
    jz 9f
    xor eax, eax
    ret
1:  test edi, 8                         // one word of a vocabulary, then one of common letters
    jz 2f
    shr rax, 58
    mov rax, [vocabulary + rax * 8]
    ret
2:  movd xmm0, eax
    psrld xmm0, 4
    movd xmm1, eax
    punpcklbw xmm1, xmm0
    pand xmm1, [low_nibbles]
    movdqa xmm0, [letters]
    pshufb xmm0, xmm1
    movq rax, xmm0
9:  ret

// rdx = the next number of xorshift64, which started from the page's address.
fill_step:
    mov rax, rdx
    shl rax, 13
    xor rdx, rax
    mov rax, rdx
    shr rax, 7
    xor rdx, rax
    mov rax, rdx
    shl rax, 17
    xor rdx, rax
    ret

// Check fill page rcx, which must be below fill_pages.
check_fill_page:
    call fill_page_address
    mov rdx, FILL_KEY
    xor rdx, rdi
    lea rsi, [rdi + 4096]
1:  call fill_word
    cmp [rdi], rax
    jne 2f
    add rdi, 8
    cmp rdi, rsi
    jb 1b
    ret
2:  mov rbx, rax
    mov rax, [rdi]
    mov rcx, rdi
    lea rsi, [text_fill]
    jmp fail

// The filled pages in turn, one per call.
check_next_fill_page:
    mov rcx, [r14 + CPU_FILL_CURSOR]
    cmp rcx, [fill_pages]
    jb 1f
    xor ecx, ecx
    cmp rcx, [fill_pages]
    je 2f
1:  lea rax, [rcx + 1]
    mov [r14 + CPU_FILL_CURSOR], rax
    jmp check_fill_page
2:  ret

    .data
text_memory:
    .asciz "memory is too small: pages, end of low RAM, end of high RAM,"
text_fill:
    .asciz "filled page changed: found, expected, gpa,"
    .balign 16
letters:                                // 4 bits a letter: about as dense as names and numbers in a text
    .ascii "etaoin srhld\nucm"
low_nibbles:
    .fill 16, 1, 15
vocabulary:                             // 64 words of 8 bytes
    .ascii "which   their   would   there   because people  through between "
    .ascii "another without nothing against himself already thought general "
    .ascii "country looking brought herself whether present certain several "
    .ascii "morning believe perhaps evening replied towards through company "
    .ascii "subject history account natural certain service purpose problem "
    .ascii "develop program support provide control process produce nations "
    .ascii "kingdom nothing however further example receive machine measure "
    .ascii "quality picture weather reading library science chapter section "

    .bss
    .balign 8
    .globl ledger, fill_pages
ledger:         .skip 8
fill_pages:     .skip 8
fill_low:       .skip 8
fill_low_end:   .skip 8
fill_high:      .skip 8
fill_high_end:  .skip 8
