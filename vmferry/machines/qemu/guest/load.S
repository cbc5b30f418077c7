# The first and only process of the guest that benchmarks move: a ticker, memory with known content, and a writer.
#
# Assembled to a whole ELF file (the header stands below), so that a kernel and this are all a guest needs.
# Parameters come from the kernel's command line, which hands what it does not know to the first process:
#     vf_resident=N   MiB of random content, filled once and summed again on demand
#     vf_rate=N       MiB a second that a writer dirties, as single words in the first and last place of a page
#     vf_set=N        MiB that it goes over again and again; each visit checks what the last one left
# and from the file /files, if there is one: it is mapped, and summed like the rest.
#
# What it says on the first serial port, at whose registers it writes by itself:
#     .               a tick, each millisecond of the guest's own clock
#     T n=N w=N b=N a=N d=N
#                     every 50 ticks: ticks, pages written, faults found, sums asked for, sums done
# Ticks are meant to be timed by whoever reads them: the clocks of a guest stand still while it does.
# Pressing the key v asks for the sum: b counts a sum that is not what it was.

        .intel_syntax noprefix

        .equ    ORIGIN,         0x400000
        .equ    COM1,           0x3f8
        .equ    KEYBOARD_DATA,  0x60
        .equ    KEYBOARD_STATE, 0x64
        .equ    KEY_V,          0x2f
        .equ    TICK_NS,        1000000
        .equ    TICKS_A_LINE,   50
        .equ    POLL_NS,        20000000
        .equ    LAG_NS,         20000000        # a writer that was kept waiting makes good for no more than this

# Words of the page that all processes share, at r15.
        .equ    WRITTEN,        0x00
        .equ    BAD,            0x08
        .equ    ASKED,          0x10
        .equ    DONE,           0x18
        .equ    RESIDENT,       0x20            # parameters, in MiB
        .equ    RATE,           0x28
        .equ    SET,            0x30
        .equ    FILLED,         0x38            # address and length of the random content
        .equ    FILLED_BYTES,   0x40
        .equ    FILES,          0x48            # and of the file
        .equ    FILES_BYTES,    0x50
        .equ    SUM,            0x58

        .equ    SYS_OPEN,       2
        .equ    SYS_FSTAT,      5
        .equ    SYS_MMAP,       9
        .equ    SYS_FORK,       57
        .equ    SYS_EXIT,       60
        .equ    SYS_SCHEDULER,  144
        .equ    SYS_IOPL,       172
        .equ    SYS_CLOCK,      228
        .equ    SYS_SLEEP,      230

        .text
header: .byte   0x7f, 'E', 'L', 'F', 2, 1, 1, 0
        .quad   0
        .short  2, 62                           # an executable, x86-64
        .long   1
        .quad   ORIGIN + start - header
        .quad   segment - header
        .quad   0
        .long   0
        .short  64, 56, 1, 0, 0, 0
segment:
        .long   1, 5                            # to be loaded, readable and executable
        .quad   0, ORIGIN, ORIGIN
        .quad   finish - header, finish - header
        .quad   0x1000

start:  mov     r14, rsp
        mov     esi, 4096
        mov     r10d, 0x21                      # shared with children, of no file
        call    map
        mov     r15, rax
        mov     edi, 3
        mov     eax, SYS_IOPL
        syscall

# The environment lies behind the arguments.
        mov     rcx, [r14]
        lea     r13, [r14 + rcx * 8 + 16]
1:      mov     rsi, [r13]
        test    rsi, rsi
        jz      2f
        lea     rdi, [rip + key_resident]
        lea     r12, [r15 + RESIDENT]
        call    parameter
        lea     rdi, [rip + key_rate]
        lea     r12, [r15 + RATE]
        call    parameter
        lea     rdi, [rip + key_set]
        lea     r12, [r15 + SET]
        call    parameter
        add     r13, 8
        jmp     1b

2:      call    make_resident
        call    map_files
        call    sum
        mov     [r15 + SUM], rax
        lea     rbx, [rip + checker]
        call    begin
        cmp     qword ptr [r15 + RATE], 0
        je      ticker
        lea     rbx, [rip + writer]
        call    begin

# A tick each millisecond, before everything else that runs in the guest.
ticker: push    50
        mov     rdx, rsp
        xor     edi, edi
        mov     esi, 1
        mov     eax, SYS_SCHEDULER
        syscall
        xor     ebp, ebp                        # ticks
        call    now
        mov     rbx, rax                        # when the next is due
1:      add     rbx, TICK_NS
        call    now
        cmp     rbx, rax
        jae     2f
        mov     rbx, rax                        # it comes late: those that were missed are not made good
2:      mov     rdi, rbx
        mov     esi, 1
        call    sleep
        mov     al, '.'
        call    put
        inc     rbp
        test    bpl, 7
        jnz     3f
        in      al, KEYBOARD_STATE
        test    al, 1
        jz      3f
        in      al, KEYBOARD_DATA
        cmp     al, KEY_V
        jne     3f
        inc     qword ptr [r15 + ASKED]
3:      mov     rax, rbp
        xor     edx, edx
        mov     ecx, TICKS_A_LINE
        div     rcx
        test    edx, edx
        jnz     1b
        call    line
        jmp     1b

line:   lea     rsi, [rip + word_n]
        mov     rax, rbp
        call    say
        lea     rsi, [rip + word_w]
        mov     rax, [r15 + WRITTEN]
        call    say
        lea     rsi, [rip + word_b]
        mov     rax, [r15 + BAD]
        call    say
        lea     rsi, [rip + word_a]
        mov     rax, [r15 + ASKED]
        call    say
        lea     rsi, [rip + word_d]
        mov     rax, [r15 + DONE]
        call    say
        mov     al, '\n'
        jmp     put

# Sums all that must not change, whenever it is asked for.
checker:
        mov     edi, POLL_NS
        xor     esi, esi
        call    sleep
        mov     rbx, [r15 + ASKED]
        cmp     rbx, [r15 + DONE]
        je      checker
        call    sum
        cmp     rax, [r15 + SUM]
        je      1f
        inc     qword ptr [r15 + BAD]
1:      mov     [r15 + DONE], rbx
        jmp     checker

# Goes over its set. Page p holds, since pass w, the word w * GOLDEN + p * MIX in its first and last place.
writer: mov     rsi, [r15 + SET]
        shl     rsi, 20
        mov     r10d, 0x22
        call    map
        mov     r12, rax                        # the set
        mov     r13, rsi                        # its bytes
        call    fill
        xor     ebp, ebp                        # pass
        call    every_page
        mov     qword ptr [r15 + WRITTEN], 0
        inc     ebp
        xor     ebx, ebx                        # place in the set
        call    now
        mov     r14, rax                        # when it was last looked at the clock
        xor     r8d, r8d                        # what is owed, in pages * 1e9
1:      call    now
        mov     rdx, rax
        sub     rdx, r14
        mov     r14, rax
        cmp     rdx, LAG_NS
        jbe     2f
        mov     edx, LAG_NS
2:      mov     rax, [r15 + RATE]
        shl     rax, 8                          # pages a second
        imul    rdx, rax
        add     r8, rdx
3:      cmp     r8, 1000000000
        jb      5f
        sub     r8, 1000000000
        call    visit
        inc     qword ptr [r15 + WRITTEN]
        add     rbx, 4096
        cmp     rbx, r13
        jb      3b
        xor     ebx, ebx
        inc     ebp
        jmp     3b
5:      push    r8
        mov     edi, TICK_NS
        xor     esi, esi
        call    sleep
        pop     r8
        jmp     1b

every_page:
        xor     ebx, ebx
1:      call    stamp
        add     rbx, 4096
        cmp     rbx, r13
        jb      1b
        ret

# Checks the page at rbx in the set for what pass rbp - 1 left, and stamps it.
visit:  mov     rax, rbp
        dec     rax
        call    value
        cmp     rax, [r12 + rbx]
        jne     1f
        cmp     rax, [r12 + rbx + 4088]
        je      stamp
1:      inc     qword ptr [r15 + BAD]
stamp:  mov     rax, rbp
        call    value
        mov     [r12 + rbx], rax
        mov     [r12 + rbx + 4088], rax
        ret

value:  movabs  rcx, 0x9e3779b97f4a7c15
        imul    rax, rcx
        movabs  rcx, 0xbf58476d1ce4e5b9
        imul    rcx, rbx
        add     rax, rcx
        ret

make_resident:
        mov     rsi, [r15 + RESIDENT]
        shl     rsi, 20
        jz      1f
        mov     r10d, 0x22
        call    map
        mov     [r15 + FILLED], rax
        mov     [r15 + FILLED_BYTES], rsi
        jmp     fill
1:      ret

# Fills rsi bytes at rax with what cannot be compressed.
fill:   mov     rdi, rax
        add     rsi, rax
        movabs  rax, 0x9e3779b97f4a7c15
        xor     rax, rdi
1:      mov     rdx, rax
        shl     rdx, 13
        xor     rax, rdx
        mov     rdx, rax
        shr     rdx, 7
        xor     rax, rdx
        mov     rdx, rax
        shl     rdx, 17
        xor     rax, rdx
        mov     [rdi], rax
        add     rdi, 8
        cmp     rdi, rsi
        jb      1b
        ret

map_files:
        lea     rdi, [rip + name_files]
        xor     esi, esi
        mov     eax, SYS_OPEN
        syscall
        test    eax, eax
        js      1f
        mov     r8d, eax
        sub     rsp, 144
        mov     edi, eax
        mov     rsi, rsp
        mov     eax, SYS_FSTAT
        syscall
        mov     rsi, [rsp + 48]
        add     rsp, 144
        xor     edi, edi
        mov     edx, 1
        mov     r10d, 1
        xor     r9d, r9d
        mov     eax, SYS_MMAP
        syscall
        test    rax, rax
        js      give_up
        mov     [r15 + FILES], rax
        and     rsi, -8
        mov     [r15 + FILES_BYTES], rsi
1:      ret

# The sum of all that must not change: rax.
sum:    xor     eax, eax
        mov     rdi, [r15 + FILLED]
        mov     rsi, [r15 + FILLED_BYTES]
        call    1f
        mov     rdi, [r15 + FILES]
        mov     rsi, [r15 + FILES_BYTES]
1:      add     rsi, rdi
2:      cmp     rdi, rsi
        jae     3f
        rol     rax, 1
        add     rax, [rdi]
        add     rdi, 8
        jmp     2b
3:      ret

# Maps rsi bytes of memory that are no file's; r10: how. Gives rax, and leaves rsi.
map:    xor     edi, edi
        mov     edx, 3
        mov     r8, -1
        xor     r9d, r9d
        mov     eax, SYS_MMAP
        syscall
        test    rax, rax
        js      give_up
        ret

# The death of the first process stops the guest, and says so.
give_up:
        mov     edi, 1
        mov     eax, SYS_EXIT
        syscall

# Begins another process at rbx.
begin:  mov     eax, SYS_FORK
        syscall
        test    eax, eax
        js      give_up
        jz      1f
        ret
1:      jmp     rbx

# The guest's clock in nanoseconds: rax.
now:    sub     rsp, 16
        mov     edi, 1
        mov     rsi, rsp
        mov     eax, SYS_CLOCK
        syscall
        imul    rax, [rsp], 1000000000
        add     rax, [rsp + 8]
        add     rsp, 16
        ret

# Sleeps for rdi nanoseconds, or with esi = 1 until then.
sleep:  sub     rsp, 16
        mov     rax, rdi
        xor     edx, edx
        mov     ecx, 1000000000
        div     rcx
        mov     [rsp], rax
        mov     [rsp + 8], rdx
        mov     edi, 1
        mov     rdx, rsp
        xor     r10d, r10d
        mov     eax, SYS_SLEEP
        syscall
        add     rsp, 16
        ret

# If the text at rsi begins with that at rdi, the number behind it goes where r12 points. Leaves rsi.
parameter:
        push    rsi
1:      mov     al, [rdi]
        test    al, al
        jz      2f
        cmp     al, [rsi]
        jne     4f
        inc     rdi
        inc     rsi
        jmp     1b
2:      xor     eax, eax
3:      movzx   ecx, byte ptr [rsi]
        sub     ecx, '0'
        cmp     ecx, 9
        ja      5f
        imul    rax, rax, 10
        add     rax, rcx
        inc     rsi
        jmp     3b
5:      mov     [r12], rax
4:      pop     rsi
        ret

# Says the text at rsi, and the number rax.
say:    push    rax
1:      lodsb
        test    al, al
        jz      2f
        call    put
        jmp     1b
2:      pop     rax
        mov     ecx, 10
        push    0
3:      xor     edx, edx
        div     rcx
        add     edx, '0'
        push    rdx
        test    rax, rax
        jnz     3b
4:      pop     rax
        test    eax, eax
        jz      5f
        call    put
        jmp     4b
5:      ret

put:    mov     dx, COM1
        out     dx, al
        ret

key_resident:   .asciz "vf_resident="
key_rate:       .asciz "vf_rate="
key_set:        .asciz "vf_set="
name_files:     .asciz "/files"
word_n:         .asciz "\nT n="
word_w:         .asciz " w="
word_b:         .asciz " b="
word_a:         .asciz " a="
word_d:         .asciz " d="
finish:
