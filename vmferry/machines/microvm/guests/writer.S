# writer: dirties memory at a steady rate and says how much it has written.
#
# Parameters: 0 dirty-mib-per-s (default 64), 1 working-set-mib (default: half of RAM), 2 full-pages (default 0).
# Lines:      writer ready pages=N
#             writer written=PAGES us=GUEST_MICROSECONDS pass=N bad=N        about every 100 ms of guest time
#             writer verify pages=N bad=N                                    after the serial input byte `v`
#             writer BAD kind=working page=N want=N got=N
#
# Registers kept throughout: rbx = guest clock at which the next line is due, r12 = mismatches found.

        .include "machine.inc"
        jmp     start
        .include "library.inc"
        .include "dirtier.inc"

        .equ    LINE_NS, 100000000

start:
        mov     esp, STACK_TOP
        mov     eax, STATE_BASE
        wrfsbase rax
        xor     r12d, r12d

        IN64    PORT_MEMORY
        mov     r13, rax
        mov     r14, rax
        shr     r14, 21                         # half of RAM, in MiB
        PARAM   1, r14
        mov     r14, rax
        inc     rax                             # the first MiB is the program's
        shl     rax, 20
        cmp     rax, r13
        ja      cannot_fit
        PARAM   0, 64
        mov     r15, rax
        PARAM   2, 0
        mov     rcx, rax
        mov     edi, PAGES_BASE
        imul    rsi, r14, PAGES_PER_MIB
        imul    rdx, r15, PAGES_PER_MIB
        call    dirty_start
        PRINT_NUMBER "writer ready pages=", fs:[DIRTY_PAGES]
        PRINT   "\n"
        mov     rbx, fs:[DIRTY_SINCE]

again:
        call    dirty_step
        test    rax, rax
        jg      1f                              # behind the rate: no sleep
        mov     eax, 1000
        SLEEP
1:      mov     edx, PORT_SERIAL_LS
        in      al, dx
        test    al, 1
        jz      2f
        mov     edx, PORT_SERIAL
        in      al, dx
        cmp     al, 'v'
        jne     2f
        call    verify
2:      IN64    PORT_MONOTONIC
        cmp     rax, rbx
        jb      again
        lea     rbx, [rax + LINE_NS]
        sub     rax, fs:[DIRTY_SINCE]
        xor     edx, edx
        mov     ecx, 1000
        div     rcx
        mov     r13, rax
        PRINT_NUMBER "writer written=", fs:[DIRTY_WRITTEN]
        PRINT_NUMBER " us=", r13
        PRINT_NUMBER " pass=", fs:[DIRTY_PASS]
        PRINT_NUMBER " bad=", r12
        PRINT   "\n"
        jmp     again

verify:
        mov     r13, r12
        call    dirty_verify
        PRINT_NUMBER "writer verify pages=", fs:[DIRTY_PAGES]
        mov     rdi, r12
        sub     rdi, r13
        PRINT_NUMBER " bad=", rdi
        PRINT   "\n"
        ret

dirty_mismatch:
        inc     r12
        PRINT_NUMBER "writer BAD kind=working page=", r8
        PRINT_NUMBER " want=", r9
        PRINT_NUMBER " got=", r10
        PRINT   "\n"
        ret

cannot_fit:
        PRINT   "writer error: the working set does not fit into memory\n"
1:      hlt
        jmp     1b
