# asker: asks the host's metadata service for its events again and again, and says what it was told.
#
# Parameters: 0 poll-us (default 300000), 1 approve (default 0): whether it approves events that are scheduled.
# Lines:      asker told=DOCUMENT             what came back
#             asker unanswered                nothing came back within two seconds of guest time
#             asker approved=STATUS           how its approval was answered
#
# Registers kept throughout: r12 = poll-us, r13 = approve; r14 = bytes that came back, in BUFFER.

        .include "machine.inc"
        jmp     start
        .include "library.inc"

        .equ    BUFFER,         PAGES_BASE
        .equ    BUFFER_BYTES,   0x10000
        .equ    SILENT_MS,      30              # an answer is whole when nothing more has come for so long
        .equ    PATIENCE_MS,    2000
        .equ    STATUS_AT,      9               # behind "HTTP/1.1 "
        .equ    ID_BYTES,       36

# Before the code: to the assembler, the name of a length that it has not met yet is an address.
ask:    .ascii  "GET /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\n"
        .ascii  "Host: 169.254.169.254\r\nMetadata: true\r\n\r\n"
        .equ    ASK_BYTES, . - ask
approve:
        .ascii  "POST /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\n"
        .ascii  "Host: 169.254.169.254\r\nMetadata: true\r\nContent-Length: 70\r\n\r\n"
        .ascii  "{\"StartRequests\":[{\"EventId\":\""
identity:
        .fill   ID_BYTES, 1, '-'
        .ascii  "\"}]}"
        .equ    APPROVE_BYTES, . - approve
blank:  .ascii  "\r\n\r\n"
        .equ    BLANK_BYTES, . - blank
scheduled:
        .ascii  "\"EventStatus\":\"Scheduled\""
        .equ    SCHEDULED_BYTES, . - scheduled
event:  .ascii  "\"EventId\":\""
        .equ    EVENT_BYTES, . - event

start:
        mov     esp, STACK_TOP
        PARAM   0, 300000
        mov     r12, rax
        PARAM   1, 0
        mov     r13, rax

again:
        lea     rsi, [rip + ask]
        mov     ecx, ASK_BYTES
        call    exchange
        lea     rsi, [rip + blank]
        mov     ecx, BLANK_BYTES
        call    find
        test    rax, rax
        jz      unanswered
        mov     r15, rax
        PRINT   "asker told="
        mov     rsi, r15
        lea     rcx, [r14 + BUFFER]
        sub     rcx, r15
        call    print_bytes
        PRINT   "\n"
        test    r13, r13
        jz      rest
        lea     rsi, [rip + scheduled]
        mov     ecx, SCHEDULED_BYTES
        call    find
        test    rax, rax
        jz      rest
        lea     rsi, [rip + event]
        mov     ecx, EVENT_BYTES
        call    find
        test    rax, rax
        jz      rest
        mov     rsi, rax
        lea     rdi, [rip + identity]
        mov     ecx, ID_BYTES
        rep movsb
        lea     rsi, [rip + approve]
        mov     ecx, APPROVE_BYTES
        call    exchange
        test    r14, r14
        jz      unanswered
        PRINT   "asker approved="
        mov     esi, BUFFER + STATUS_AT
        mov     ecx, 3
        call    print_bytes
        PRINT   "\n"
        jmp     rest
unanswered:
        PRINT   "asker unanswered\n"
rest:
        mov     eax, r12d
        SLEEP
        jmp     again

# Sends the ecx bytes at rsi, and takes what comes back into BUFFER; r14 = its length. Clobbers rax, rcx, rdx, rsi, r11.
exchange:
        mov     edx, PORT_METADATA
1:      mov     al, [rsi]
        out     dx, al
        inc     rsi
        dec     ecx
        jnz     1b
        mov     edx, PORT_METADATA_LS
        out     dx, al                          # all of it was given
        xor     r14d, r14d
        xor     r11d, r11d
2:      mov     edx, PORT_METADATA_LS
        in      al, dx
        test    al, 1
        jz      3f
        mov     edx, PORT_METADATA
        in      al, dx
        xor     r11d, r11d
        cmp     r14, BUFFER_BYTES
        jae     2b
        mov     [r14 + BUFFER], al
        inc     r14
        jmp     2b
3:      inc     r11d
        mov     ecx, PATIENCE_MS
        mov     eax, SILENT_MS
        test    r14, r14
        cmovnz  ecx, eax
        cmp     r11d, ecx
        ja      4f
        mov     eax, 1000
        SLEEP
        jmp     2b
4:      ret

# rax = behind the first place of what came back that holds the ecx bytes at rsi; 0 if there is none.
# Clobbers rcx, rdx, rsi, rdi, r8, r9, r10.
find:
        mov     r8, rsi
        mov     r9d, ecx
        mov     r10d, BUFFER
1:      lea     rax, [r10 + r9]
        lea     rdx, [r14 + BUFFER]
        cmp     rax, rdx
        ja      2f
        mov     rsi, r8
        mov     rdi, r10
        mov     ecx, r9d
        repe cmpsb
        lea     rax, [r10 + r9]
        je      3f
        inc     r10
        jmp     1b
2:      xor     eax, eax
3:      ret

# Prints the rcx bytes at rsi. Clobbers rax, rcx, rdx, rsi.
print_bytes:
        mov     edx, PORT_SERIAL
1:      test    rcx, rcx
        jz      2f
        mov     al, [rsi]
        out     dx, al
        inc     rsi
        dec     rcx
        jmp     1b
2:      ret
