// Pages under the ledger: one update and one check.
//
// A page is { gpa, seq, ~seq, sum } at PAGE_GPA and payload in all other bytes; sum is over the payload's 64-bit
// words, each times its odd position. An update changes a few payload bytes of one page, or of two neighbours when
// it crosses the border; it counts on in the page, in the ledger (other pages) and in r15 and xmm15 (no page).
#include "guest.h"
    .intel_syntax noprefix

#define WAY_CROSSING    8               // ways from here cross a page border
#define WAY_LOCKED      12              // ways from here are LOCKed

    .text
    .globl init_pages, update_random_page, check_page, check_ledger_sum

// Headers for the own pages; their payload is what RAM holds.
init_pages:
    mov rbx, [r14 + CPU_FIRST]
    mov [r14 + CPU_CURSOR], rbx
1:  cmp rbx, [r14 + CPU_END]
    jae 2f
    call page_address
    mov [rdi + PAGE_GPA], rdi
    mov qword ptr [rdi + PAGE_SEQ], 0
    mov qword ptr [rdi + PAGE_INVERSE], -1
    call sum_page
    mov [rdi + PAGE_SUM], rax
    inc rbx
    jmp 1b
2:  ret

// rdi = address of page rbx, rsi = its ledger entry.
page_address:
    mov rsi, rbx
    shl rsi, 4
    add rsi, [ledger]
    mov rdi, [rsi + 8]
    ret

// rax = sum of the whole payload of the page at rdi. Loses rcx, rdx, r8.
sum_page:
    xor ecx, ecx
    mov edx, PAGE_GPA
    call sum_bytes
    push rax
    mov ecx, PAGE_HEADER_END
    mov edx, 4096
    call sum_bytes
    pop rcx
    add rax, rcx
    ret

// rax = sum of the words of the page at rdi that hold the bytes from ecx to before edx. Loses rcx, rdx, r8.
sum_bytes:
    xor eax, eax
    and ecx, -8
1:  cmp ecx, edx
    jae 2f
    lea r8d, [rcx + 1]                  // position * 8 + 1: odd
    imul r8, [rdi + rcx]
    add rax, r8
    add ecx, 8
    jmp 1b
2:  ret

// The header of the page at rdi against the ledger entry at rsi. Loses rax, rbx, rcx on failure only.
check_header:
    cmp [rdi + PAGE_GPA], rdi
    jne 1f
    mov rax, [rsi]
    cmp [rdi + PAGE_SEQ], rax
    jne 2f
    not rax
    cmp [rdi + PAGE_INVERSE], rax
    jne 3f
    ret
1:  mov rax, [rdi + PAGE_GPA]
    mov rbx, rdi
    lea rsi, [text_gpa]
    jmp 4f
2:  mov rbx, rax
    mov rax, [rdi + PAGE_SEQ]
    lea rsi, [text_seq]
    jmp 4f
3:  mov rbx, rax
    mov rax, [rdi + PAGE_INVERSE]
    lea rsi, [text_inverse]
4:  mov rcx, rdi
    jmp fail

// All of page rbx.
check_page:
    call page_address
    call check_header
    call sum_page
    mov rbx, [rdi + PAGE_SUM]
    cmp rax, rbx
    jne 1f
    ret
1:  mov rcx, rdi
    lea rsi, [text_sum]
    jmp fail

// The sum of the own ledger entries is the number of updates in r15.
check_ledger_sum:
    mov rbx, [r14 + CPU_FIRST]
    call page_address
    xor eax, eax
1:  cmp rbx, [r14 + CPU_END]
    jae 2f
    add rax, [rsi]
    add rsi, 16
    inc rbx
    jmp 1b
2:  mov rbx, r15
    cmp rax, rbx
    jne 3f
    ret
3:  mov rcx, [r14 + CPU_INDEX]
    lea rsi, [text_ledger]
    jmp fail

// One update. rbx page, rdi its address, rsi its ledger entry, r9d first byte, r10d length, r11d way of writing.
update_random_page:
    call random
    mov edx, eax
    mov rbx, [r14 + CPU_END]
    sub rbx, [r14 + CPU_FIRST]
    imul rbx, rdx
    shr rbx, 32
    add rbx, [r14 + CPU_FIRST]
    mov r11, rax
    shr r11, 60
    movzx r10d, byte ptr [lengths + r11]
    shr rax, 32
    movzx r9d, ax                       // 0 to 65535, so 0 to 3999 after the shift
    imul r9d, r9d, 4096 - PAGE_HEADER_END
    shr r9d, 16
    add r9d, PAGE_HEADER_END
    call page_address
    cmp r11d, WAY_LOCKED
    jae 1f
    cmp r11d, WAY_CROSSING
    jb 2f
    mov ecx, r10d                       // half of it on each side of the border
    shr ecx, 1
    mov r9d, 4096
    sub r9d, ecx
    jmp 2f
1:  and r9d, -8                         // a locked access must not cross a cache line
2:  lea ecx, [r9 + r10]
    cmp ecx, 4096
    jbe update_one
    lea rcx, [rbx + 1]
    cmp rcx, [r14 + CPU_END]
    jae 3f
    lea rcx, [rdi + 4096]
    cmp [rsi + 24], rcx                 // is the next page of the ledger the next in memory?
    je update_two
3:  mov r9d, 4096
    sub r9d, r10d

update_one:
    call check_header
    mov ecx, r9d
    lea edx, [r9 + r10]
    call sum_bytes
    sub [rdi + PAGE_SUM], rax
    push rdi
    push rsi
    call write_bytes
    pop rsi
    pop rdi
    mov ecx, r9d
    lea edx, [r9 + r10]
    call sum_bytes
    add [rdi + PAGE_SUM], rax
count_update:
    inc qword ptr [rdi + PAGE_SEQ]
    dec qword ptr [rdi + PAGE_INVERSE]  // ~(n + 1) = ~n - 1
    inc qword ptr [rsi]
    inc r15
    paddq xmm15, xmm14
    ret

update_two:
    call check_header
    mov ecx, r9d
    mov edx, 4096
    call sum_bytes
    sub [rdi + PAGE_SUM], rax
    call second_page
    call check_header
    call sum_bytes
    sub [rdi + PAGE_SUM], rax
    sub rdi, 4096
    sub rsi, 16
    push rdi
    push rsi
    call write_bytes
    pop rsi
    pop rdi
    mov ecx, r9d
    mov edx, 4096
    call sum_bytes
    add [rdi + PAGE_SUM], rax
    call count_update
    call second_page
    call sum_bytes
    add [rdi + PAGE_SUM], rax
    jmp count_update

// From the first to the second page of a crossing update: ecx, edx are the bytes there.
second_page:
    add rdi, 4096
    add rsi, 16
    xor ecx, ecx
    lea edx, [r9 + r10 - 4096]
    ret

// Write r10d random bytes at rdi + r9 the way r11d says. Loses rax, rcx, rsi, rdi.
write_bytes:
    call random
    add rdi, r9
    jmp [ways + r11 * 8]
write_1:
    mov [rdi], al
    ret
write_2:
    mov [rdi], ax
    ret
write_4:
    mov [rdi], eax
    ret
write_8:
    mov [rdi], rax
    ret
write_32:
    movq xmm1, r13
    movdqu [rdi + 16], xmm1
write_16:
    movq xmm0, rax
    movq xmm2, r13
    punpcklqdq xmm0, xmm2
    paddq xmm0, xmm15
    movdqu [rdi], xmm0
    ret
write_stos:
    mov ecx, r10d
    rep stosb
    ret
write_movs:
    lea rsi, [boundary_text]
    and eax, 63
    add rsi, rax
    mov ecx, r10d
    rep movsb
    ret
write_xadd:
    lock xadd [rdi], rax
    ret
write_xor:
    lock xor [rdi], rax
    ret
write_cmpxchg:
    mov rcx, rax
    mov rax, [rdi]
    lock cmpxchg [rdi], rcx
    ret
write_bts:
    and eax, 63
    lock btc [rdi], rax
    ret

    .data
    .balign 8
ways:
    .quad write_1, write_2, write_4, write_8, write_16, write_32, write_stos, write_movs
    .quad write_8, write_32, write_stos, write_movs
    .quad write_xadd, write_xor, write_cmpxchg, write_bts
lengths:
    .byte 1, 2, 4, 8, 16, 32, 57, 41
    .byte 8, 32, 38, 60
    .byte 8, 8, 8, 8
boundary_text:                          // 128 bytes to copy from
    .ascii "kvmigrate moves guests; a page that is lost, late, swapped or torn breaks the ledger, and the"
    .ascii " guest says so itself: BAD page."
    .skip 128 - (. - boundary_text), '.'
text_gpa:       .asciz "page is another one: gpa found, expected, gpa,"
text_seq:       .asciz "page is not of this time: updates found, expected by the ledger, gpa,"
text_inverse:   .asciz "page header is torn: found, expected, gpa,"
text_sum:       .asciz "page content does not match its sum: found, expected, gpa,"
text_ledger:    .asciz "ledger and register differ: sum of the ledger, register, vcpu,"
