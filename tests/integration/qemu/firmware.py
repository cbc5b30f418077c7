"""The smallest guest that checks itself: a firmware image that boots in no time and needs nothing else.

It runs in real mode, is woken by the timer 18 times a second, rewrites and compares 64 KiB, compares another 64 KiB
that it filled once, and says on its serial port what the Linux guest says (``vmferry.machines.qemu.guest``), so that
the same reader understands both. What the processor, the interrupt controllers, the timer and the serial port hold
is needed for the next line.
"""

from __future__ import annotations

from typing import Final

_SIZE: Final = 64 * 1024
_ENTRY: Final = _SIZE - 16
_JUMP_TO_START: Final = bytes.fromhex("ea 0000 00f0")
_CODE: Final = """
# No interrupts yet; stack and data at 0.
fa                         # cli
fc                         # cld
31 c0                      # xor %ax,%ax
8e d0                      # mov %ax,%ss
bc 00 7c                   # mov $0x7c00,%sp
8e d8                      # mov %ax,%ds
8e c0                      # mov %ax,%es
# The timer's interrupts, vector 8, come to irq0.
c7 06 20 00 07 01          # movw $0x107,0x20
c7 06 22 00 00 f0          # movw $0xf000,0x22
# The words are copied to where they can be changed, 0x500.
be 24 01                   # mov $0x124,%si
bf 00 05                   # mov $0x500,%di
b9 5a 00                   # mov $0x5a,%cx
2e f3 a4                   # rep movsb %cs:(%si),%es:(%di)
# First interrupt controller: vectors from 8 on, only the timer's line open.
b0 11                      # mov $0x11,%al
e6 20                      # out %al,$0x20
b0 08                      # mov $0x8,%al
e6 21                      # out %al,$0x21
b0 04                      # mov $0x4,%al
e6 21                      # out %al,$0x21
b0 01                      # mov $0x1,%al
e6 21                      # out %al,$0x21
b0 fe                      # mov $0xfe,%al
e6 21                      # out %al,$0x21
# A segment as large as the address space, to reach the local APIC: enabled, line 0 as in a PC of old.
2e 66 0f 01 16 0e 01       # lgdtl %cs:0x10e
0f 20 c0                   # mov %cr0,%eax
0c 01                      # or $0x1,%al
0f 22 c0                   # mov %eax,%cr0
bb 08 00                   # mov $0x8,%bx
8e e3                      # mov %bx,%fs
24 fe                      # and $0xfe,%al
0f 22 c0                   # mov %eax,%cr0
66 bb f0 00 e0 fe          # mov $0xfee000f0,%ebx
64 67 66 c7 03 ff 01 00 00 # movl $0x1ff,%fs:(%ebx)
bb 50 03                   # mov $0x350,%bx
64 67 66 c7 03 00 07 00 00 # movl $0x700,%fs:(%ebx)
# Timer: as slow as it goes, 18.2 Hz.
b0 34                      # mov $0x34,%al
e6 43                      # out %al,$0x43
31 c0                      # xor %ax,%ax
e6 40                      # out %al,$0x40
e6 40                      # out %al,$0x40
# Resident memory: 64 KiB of numbers that follow from each other, and do not look so.
b8 00 10                   # mov $0x1000,%ax
8e c0                      # mov %ax,%es
31 ff                      # xor %di,%di
69 c0 55 62                # imul $0x6255,%ax,%ax
05 19 36                   # add $0x3619,%ax
ab                         # stos %ax,%es:(%di)
85 ff                      # test %di,%di
75 f4                      # jne 0x7e
# It is ready.
be 00 05                   # mov $0x500,%si
e8 63 00                   # call 0xf3
# again: wait for the timer.
fb                         # sti
f4                         # hlt
fa                         # cli
# Count on, in decimal digits.
bb 1d 05                   # mov $0x51d,%bx
fe 07                      # incb (%bx)
80 3f 39                   # cmpb $0x39,(%bx)
76 06                      # jbe 0xa3
c6 07 30                   # movb $0x30,(%bx)
4b                         # dec %bx
eb f3                      # jmp 0x96
# The line about the check carries the same number.
8c d8                      # mov %ds,%ax
8e c0                      # mov %ax,%es
be 16 05                   # mov $0x516,%si
bf 4a 05                   # mov $0x54a,%di
b9 08 00                   # mov $0x8,%cx
f3 a4                      # rep movsb %ds:(%si),%es:(%di)
# Rewrite 64 KiB with the last two digits, and compare.
b8 00 20                   # mov $0x2000,%ax
8e c0                      # mov %ax,%es
a1 1c 05                   # mov 0x51c,%ax
31 ff                      # xor %di,%di
b9 00 80                   # mov $0x8000,%cx
f3 ab                      # rep stos %ax,%es:(%di)
31 ff                      # xor %di,%di
b9 00 80                   # mov $0x8000,%cx
f3 af                      # repz scas %es:(%di),%ax
75 17                      # jne 0xe1
# Compare the resident memory.
b8 00 10                   # mov $0x1000,%ax
8e c0                      # mov %ax,%es
31 ff                      # xor %di,%di
69 c0 55 62                # imul $0x6255,%ax,%ax
05 19 36                   # add $0x3619,%ax
af                         # scas %es:(%di),%ax
75 06                      # jne 0xe1
85 ff                      # test %di,%di
75 f2                      # jne 0xd1
eb 0a                      # jmp 0xeb
# bad: both lines say so for ever.
c6 06 38 05 31             # movb $0x31,0x538
c6 06 57 05 31             # movb $0x31,0x557
# tell: and again.
be 0f 05                   # mov $0x50f,%si
e8 02 00                   # call 0xf3
eb 9d                      # jmp 0x90
# say: each byte once the serial port has taken the one before.
ac                         # lods %ds:(%si),%al
84 c0                      # test %al,%al
74 0e                      # je 0x106
ba f8 03                   # mov $0x3f8,%dx
ee                         # out %al,(%dx)
ba fd 03                   # mov $0x3fd,%dx
ec                         # in (%dx),%al
a8 20                      # test $0x20,%al
74 fb                      # je 0xff
eb ed                      # jmp 0xf3
c3                         # ret
# irq0: acknowledge.
50                         # push %ax
b0 20                      # mov $0x20,%al
e6 20                      # out %al,$0x20
58                         # pop %ax
cf                         # iret
"""
# A limit of 15 and the address of: nothing, and data from 0 to the end of 4 GiB.
_SEGMENTS: Final = bytes.fromhex("0f00 14010f00 0000000000000000 ffff000000 93cf00")
_WORDS: Final = (
    b"ready files=1\n\0"
    b"tick n=00000000 up=0.00 gap=0 wall=0 bad=0\n"
    b"check n=1 begun=00000000 bad=0\n\0"
)  # fmt: skip


def image() -> bytes:
    """The firmware, to be given as ``qemu.firmware``."""
    code = b"".join(bytes.fromhex(line.partition("#")[0]) for line in _CODE.splitlines())
    program = code + _SEGMENTS + _WORDS
    return (program.ljust(_ENTRY, b"\0") + _JUMP_TO_START).ljust(_SIZE, b"\0")
