# canary: a guest that notices when a migration lost, tore, mixed up or brought back old memory or registers.
#
# Parameters: 0 resident-mib (default: half of RAM), 1 tick-us (default 1000), 2 dirty-mib-per-s (default 0),
#             3 working-set-mib (default: the smaller of resident-mib and 64), 4 full-pages (default 0).
# Lines:      canary ready pages=N working=N
#             canary tick=N sweep=N pos=N checked=N bad=N gap_us=N           about every 100 ms of guest time
#             canary verify pages=N working=N bad=N                          after the serial input byte `v`
#             canary BAD kind=KIND page=N want=N got=N                       (the first BAD_LINES of them)
#
# The chain. N pages are rewritten one per tick, in order, sweep after sweep. In sweep s with position p, the pages
# below p have generation s + 2 and the others s + 1: two registers say what every page must hold.
# A page holds (offsets): 0 magic, 8 index, 16 generation, 24 checksum of the page before it in the chain as it was
# when this page was written, 32.. body derived from (index, generation), 4080 generation again, 4088 checksum.
# The link of a page equals the present checksum of the page before it, except at the position itself, whose
# predecessor has just been rewritten: that one's old checksum is kept in a register.
#
# KIND: lost (no magic: a zero page), torn (head and tail are of different generations), corrupt (checksum),
#       misplaced (another page's content), stale (another generation), body (not the content this page must have),
#       chain (link), working (a page of the working set), register (a register differs from its copy in memory),
#       time (the time of day stepped back: page is 0, want the time read before, got the one read now).
#
# Registers kept throughout, each with its copy in the state page, compared at every tick:
        # rbx   ticks
        # r12   sweep
        # r13   position in the chain
        # r14   pseudo-random state
        # r15   checksum that the page before the position had before its last rewrite
        # xmm15 ticks once more, so that a lost vector register shows as well
        # rbp   index of the page being checked, in loops

        .include "machine.inc"
        jmp     start
        .include "library.inc"
        .include "dirtier.inc"

        .equ    LINE_NS,        100000000
        .equ    RANDOM_CHECKS,  3
        .equ    BAD_LINES,      64
        .equ    MAGIC,          0x315952414e414356      # "VCANARY1"

        .equ    PAGE_MAGIC,     0
        .equ    PAGE_INDEX,     8
        .equ    PAGE_GEN,       16
        .equ    PAGE_LINK,      24
        .equ    PAGE_BODY,      32
        .equ    PAGE_BODY_END,  4072                    # the last word of the body
        .equ    PAGE_TAIL_GEN,  4080
        .equ    PAGE_SUM,       4088
        .equ    BODY_WORDS,     506

# Words of the state page, as offsets from FS.
        .equ    COPY_TICKS,     0x00                    # copies of the registers, in this order
        .equ    COPY_SWEEP,     0x08
        .equ    COPY_POS,       0x10
        .equ    COPY_RANDOM,    0x18
        .equ    COPY_OLD_SUM,   0x20
        .equ    COPY_CHECK,     0x28                    # their sum, to know which side is damaged
        .equ    PAGES,          0x40
        .equ    TICK_US,        0x48
        .equ    CHECKED,        0x50
        .equ    BAD,            0x58
        .equ    NEXT_LINE,      0x60
        .equ    LAST_REALTIME,  0x68
        .equ    GAP_NS,         0x70

# Compares a register with its copy; `slot` is the number printed as page.
        .macro  COMPARE register, copy, slot
        cmp     \register, fs:[\copy]
        je      9f
        mov     r8d, \slot
        mov     r9, fs:[\copy]
        mov     r10, \register
        call    report
        .asciz  "register"
        mov     ebp, 1
9:
        .endm

start:
        mov     esp, STACK_TOP
        mov     eax, STATE_BASE
        wrfsbase rax
        call    configure
        call    create_chain
        PRINT_NUMBER "canary ready pages=", fs:[PAGES]
        PRINT_NUMBER " working=", fs:[DIRTY_PAGES]
        PRINT   "\n"
        IN64    PORT_REALTIME
        mov     fs:[LAST_REALTIME], rax
        IN64    PORT_MONOTONIC
        mov     fs:[NEXT_LINE], rax

tick:
        call    compare_registers
        mov     rdi, r13
        call    check_page
        call    rewrite_page
        call    check_random_pages
        call    dirty_step
        inc     rbx
        movq    xmm15, rbx
        call    copy_registers
        call    measure_gap
        call    print_line_when_due
        mov     edx, PORT_SERIAL_LS
        in      al, dx
        test    al, 1
        jz      1f
        mov     edx, PORT_SERIAL
        in      al, dx
        cmp     al, 'v'
        jne     1f
        call    verify_all
1:      mov     eax, fs:[TICK_US]
        SLEEP
        jmp     tick

# Reads the parameters and lays out memory: the chain first, the working set behind it.
configure:
        IN64    PORT_MEMORY
        mov     r8, rax
        mov     r9, rax
        shr     r9, 21
        PARAM   0, r9
        mov     r9, rax                         # resident MiB
        PARAM   1, 1000
        mov     fs:[TICK_US], rax
        PARAM   2, 0
        mov     r10, rax                        # MiB to dirty per second
        xor     r11d, r11d                      # MiB of the working set
        test    r10, r10
        jz      1f
        mov     r11d, 64
        cmp     r11, r9
        cmova   r11, r9
        PARAM   3, r11
        mov     r11, rax
1:      PARAM   4, 0
        mov     r14, rax
        test    r9, r9
        jz      cannot_fit
        lea     rax, [r9 + r11 + 1]             # the first MiB is the program's
        shl     rax, 20
        cmp     rax, r8
        ja      cannot_fit
        imul    rax, r9, PAGES_PER_MIB
        mov     fs:[PAGES], rax
        mov     rdi, rax
        shl     rdi, PAGE_SHIFT
        add     rdi, PAGES_BASE
        imul    rsi, r11, PAGES_PER_MIB
        imul    rdx, r10, PAGES_PER_MIB
        mov     rcx, r14
        jmp     dirty_start

# Writes every page of the chain as generation 1 and sets the registers accordingly.
create_chain:
        xor     ebx, ebx
        xor     r12d, r12d
        xor     r13d, r13d
        mov     r14, GOLDEN
        xor     r15d, r15d
        movq    xmm15, rbx
        xor     ebp, ebp
        xor     edx, edx                        # the first page has no page before it yet
1:      mov     rdi, rbp
        mov     esi, 1
        call    fill_page
        mov     rdx, rax
        inc     rbp
        cmp     rbp, fs:[PAGES]
        jb      1b
        xor     eax, eax
        mov     fs:[CHECKED], rax
        mov     fs:[BAD], rax
        mov     fs:[GAP_NS], rax
        jmp     copy_registers

copy_registers:
        mov     fs:[COPY_TICKS], rbx
        mov     fs:[COPY_SWEEP], r12
        mov     fs:[COPY_POS], r13
        mov     fs:[COPY_RANDOM], r14
        mov     fs:[COPY_OLD_SUM], r15
        call    sum_of_copies
        mov     fs:[COPY_CHECK], rax
        ret

sum_of_copies:
        mov     rax, fs:[COPY_TICKS]
        rol     rax, 7
        add     rax, fs:[COPY_SWEEP]
        rol     rax, 7
        add     rax, fs:[COPY_POS]
        rol     rax, 7
        add     rax, fs:[COPY_RANDOM]
        rol     rax, 7
        add     rax, fs:[COPY_OLD_SUM]
        ret

# Registers against their copies. After a difference the side that is whole wins: the copies when their sum is
# right, else the registers, so that the canary can go on and report what else is wrong.
compare_registers:
        xor     ebp, ebp
        COMPARE rbx, COPY_TICKS, 0
        COMPARE r12, COPY_SWEEP, 1
        COMPARE r13, COPY_POS, 2
        COMPARE r14, COPY_RANDOM, 3
        COMPARE r15, COPY_OLD_SUM, 4
        movq    r11, xmm15
        COMPARE r11, COPY_TICKS, 5
        test    ebp, ebp
        jz      2f
        call    sum_of_copies
        cmp     rax, fs:[COPY_CHECK]
        jne     1f
        mov     rbx, fs:[COPY_TICKS]
        mov     r12, fs:[COPY_SWEEP]
        mov     r13, fs:[COPY_POS]
        mov     r14, fs:[COPY_RANDOM]
        mov     r15, fs:[COPY_OLD_SUM]
1:      movq    xmm15, rbx
        call    copy_registers
2:      ret

# rax = address of page rdi of the chain.
page_address:
        mov     rax, rdi
        shl     rax, PAGE_SHIFT
        add     rax, PAGES_BASE
        ret

# rax = address of the page before page rdi in the chain.
previous_address:
        mov     rax, rdi
        test    rax, rax
        cmovz   rax, fs:[PAGES]
        dec     rax
        shl     rax, PAGE_SHIFT
        add     rax, PAGES_BASE
        ret

# rax = first word of the body of page rdi at generation rsi. Clobbers rdx.
seed:
        mov     rdx, GOLDEN
        mov     rax, rdi
        inc     rax
        imul    rax, rdx
        mov     rdx, MIX
        imul    rdx, rsi
        rol     rdx, 31
        xor     rax, rdx
        ret

# Writes page rdi at generation rsi with link rdx. rax = its checksum. Clobbers rcx, rdx, rsi, rdi, r8.
fill_page:
        call    page_address
        mov     r8, rax
        mov     [r8 + PAGE_LINK], rdx
        mov     rcx, MAGIC
        mov     [r8 + PAGE_MAGIC], rcx
        mov     [r8 + PAGE_INDEX], rdi
        mov     [r8 + PAGE_GEN], rsi
        call    seed
        mov     rdx, GOLDEN
        mov     ecx, BODY_WORDS
        lea     rdi, [r8 + PAGE_BODY]
1:      mov     [rdi], rax
        add     rax, rdx
        add     rdi, 8
        dec     ecx
        jnz     1b
        mov     [r8 + PAGE_TAIL_GEN], rsi
        mov     rsi, r8
        call    page_sum
        mov     [r8 + PAGE_SUM], rax
        ret

# Rewrites the page at the position with its next generation and moves the position on.
rewrite_page:
        mov     rdi, r13
        call    previous_address
        mov     rdx, [rax + PAGE_SUM]
        call    page_address
        mov     r15, [rax + PAGE_SUM]
        lea     rsi, [r12 + 2]
        call    fill_page
        inc     r13
        cmp     r13, fs:[PAGES]
        jb      1f
        xor     r13d, r13d
        inc     r12
1:      ret

# Checks RANDOM_CHECKS pages anywhere in the chain.
check_random_pages:
        mov     ebp, RANDOM_CHECKS
1:      mov     rax, r14                        # xorshift64
        shl     rax, 13
        xor     r14, rax
        mov     rax, r14
        shr     rax, 7
        xor     r14, rax
        mov     rax, r14
        shl     rax, 17
        xor     r14, rax
        mov     rax, r14
        mul     qword ptr fs:[PAGES]
        mov     rdi, rdx
        call    check_page
        dec     ebp
        jnz     1b
        ret

# Checks page rdi. Keeps rbx, rbp, r12 to r15.
check_page:
        inc     qword ptr fs:[CHECKED]
        mov     r8, rdi
        call    page_address
        mov     r11, rax
        lea     r9, [r12 + 1]
        cmp     rdi, r13
        adc     r9, 0                           # below the position: rewritten in this sweep
        mov     rsi, r11
        call    page_sum
        cmp     rax, [r11 + PAGE_SUM]
        jne     damaged
        mov     rcx, MAGIC
        cmp     [r11 + PAGE_MAGIC], rcx
        jne     lost
        mov     rdi, r8
        cmp     [r11 + PAGE_INDEX], rdi
        jne     misplaced
        mov     r10, [r11 + PAGE_GEN]
        cmp     r10, r9
        jne     stale
        mov     rsi, r9
        call    seed
        mov     r10, [r11 + PAGE_BODY]
        cmp     r10, rax
        jne     wrong_body
        mov     rdx, GOLDEN
        imul    rdx, rdx, BODY_WORDS - 1
        add     rax, rdx
        mov     r10, [r11 + PAGE_BODY_END]
        cmp     r10, rax
        jne     wrong_body
        call    previous_address
        mov     r9, [rax + PAGE_SUM]
        cmp     rdi, r13
        cmove   r9, r15
        mov     r10, [r11 + PAGE_LINK]
        cmp     r10, r9
        jne     wrong_link
        ret
lost:
        mov     r10, [r11 + PAGE_MAGIC]
        mov     r9, rcx
        call    report
        .asciz  "lost"
        ret
misplaced:
        mov     r9, r8
        mov     r10, [r11 + PAGE_INDEX]
        call    report
        .asciz  "misplaced"
        ret
stale:
        call    report
        .asciz  "stale"
        ret
wrong_body:
        mov     r9, rax
        call    report
        .asciz  "body"
        ret
wrong_link:
        call    report
        .asciz  "chain"
        ret

# The checksum (rax) does not fit. Torn: head and tail are each a true part of this page, of two generations.
damaged:
        mov     rcx, rax
        mov     rdi, r8
        mov     rsi, [r11 + PAGE_GEN]
        cmp     rsi, [r11 + PAGE_TAIL_GEN]
        je      1f
        call    seed
        cmp     rax, [r11 + PAGE_BODY]
        jne     1f
        mov     rsi, [r11 + PAGE_TAIL_GEN]
        call    seed
        mov     rdx, GOLDEN
        imul    rdx, rdx, BODY_WORDS - 1
        add     rax, rdx
        cmp     rax, [r11 + PAGE_BODY_END]
        jne     1f
        mov     r10, [r11 + PAGE_GEN]
        cmp     r10, r9
        cmove   r10, rsi                        # name the generation that should not be there
        call    report
        .asciz  "torn"
        ret
1:      mov     r9, rcx
        mov     r10, [r11 + PAGE_SUM]
        call    report
        .asciz  "corrupt"
        ret

# Counts an error and prints it: r8 = page, r9 = want, r10 = got, the kind follows the call as a string.
report:
        inc     qword ptr fs:[BAD]
        cmp     qword ptr fs:[BAD], BAD_LINES
        ja      1f
        PRINT   "canary BAD kind="
        call    print_parameter
        PRINT_NUMBER " page=", r8
        PRINT_NUMBER " want=", r9
        PRINT_NUMBER " got=", r10
        PRINT   "\n"
1:      pop     rsi
2:      mov     al, [rsi]                       # return behind the string
        inc     rsi
        test    al, al
        jnz     2b
        jmp     rsi

# Prints the string behind the call of `report` that called this.
print_parameter:
        mov     rsi, [rsp + 8]
        mov     edx, PORT_SERIAL
1:      mov     al, [rsi]
        inc     rsi
        test    al, al
        jz      2f
        out     dx, al
        jmp     1b
2:      ret

dirty_mismatch:
        call    report
        .asciz  "working"
        ret

# Keeps the largest wall-clock distance between two ticks, and reports a wall clock that steps back.
measure_gap:
        IN64    PORT_REALTIME
        mov     r9, fs:[LAST_REALTIME]
        mov     fs:[LAST_REALTIME], rax
        mov     r10, rax
        xor     r8d, r8d
        cmp     rax, r9
        jb      2f
        sub     rax, r9
        cmp     rax, fs:[GAP_NS]
        jbe     1f
        mov     fs:[GAP_NS], rax
1:      ret
2:      call    report
        .asciz  "time"
        ret

print_line_when_due:
        IN64    PORT_MONOTONIC
        cmp     rax, fs:[NEXT_LINE]
        jb      1f
        add     rax, LINE_NS
        mov     fs:[NEXT_LINE], rax
        mov     rax, fs:[GAP_NS]
        xor     edx, edx
        mov     ecx, 1000
        div     rcx
        mov     rdi, rax
        mov     qword ptr fs:[GAP_NS], 0
        PRINT_NUMBER "canary tick=", rbx
        PRINT_NUMBER " sweep=", r12
        PRINT_NUMBER " pos=", r13
        PRINT_NUMBER " checked=", fs:[CHECKED]
        PRINT_NUMBER " bad=", fs:[BAD]
        PRINT_NUMBER " gap_us=", rdi
        PRINT   "\n"
1:      ret

# Checks every page of the chain and of the working set, and says how many errors that found.
verify_all:
        push    qword ptr fs:[BAD]
        xor     ebp, ebp
1:      mov     rdi, rbp
        call    check_page
        inc     rbp
        cmp     rbp, fs:[PAGES]
        jb      1b
        call    dirty_verify
        PRINT_NUMBER "canary verify pages=", fs:[PAGES]
        PRINT_NUMBER " working=", fs:[DIRTY_PAGES]
        pop     rdi
        neg     rdi
        add     rdi, fs:[BAD]
        PRINT_NUMBER " bad=", rdi
        PRINT   "\n"
        IN64    PORT_REALTIME                   # the time this took is no gap
        mov     fs:[LAST_REALTIME], rax
        ret

cannot_fit:
        PRINT   "canary error: resident and working set do not fit into memory\n"
1:      hlt
        jmp     1b
