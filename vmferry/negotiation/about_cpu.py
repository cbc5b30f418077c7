"""Findings about the processor: what the guest sees now against what it would see at the destination.

The rule is that of every hypervisor that gets this right: the destination must show all that the *guest* was shown,
whatever else the hosts themselves can do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from vmferry.negotiation.facts import CpuidKey, MachineFacts, Offer
from vmferry.negotiation.findings import Finding, finding

MOST_NAMED: Final = 16
"""Bits that a message names; of more it gives the number."""

_LEAF_1: Final = 1
_LEAF_7: Final = 7
_EXTENDED: Final = 0x80000001

# These say how processors are arranged. A hypervisor shows them by their number, and its releases differ in whether
# they are counted among the features of the model.
_OF_TOPOLOGY: Final[Mapping[CpuidKey, int]] = {
    (_LEAF_1, 0, "EDX"): 1 << 28,
    (_EXTENDED, 0, "ECX"): 1 << 1,
}

# The lowest bit first; "-" has no name here.
_NAMES: Final[Mapping[CpuidKey, str]] = {
    (_LEAF_1, 0, "ECX"): (
        "sse3 pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid dca sse4.1 "
        "sse4.2 x2apic movbe popcnt tsc-deadline aes xsave osxsave avx f16c rdrand hypervisor"
    ),
    (_LEAF_1, 0, "EDX"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx fxsr "
        "sse sse2 ss ht tm ia64 pbe"
    ),
    (_LEAF_7, 0, "EBX"): (
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm - - mpx - avx512f avx512dq rdseed adx "
        "smap avx512ifma - clflushopt clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl"
    ),
    (_LEAF_7, 0, "ECX"): (
        "- avx512vbmi umip pku ospke waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg - "
        "avx512-vpopcntdq - la57 - - - - - rdpid"
    ),
    (_LEAF_7, 0, "EDX"): (
        "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize - - - - - - - "
        "amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities - ssbd"
    ),
    (_EXTENDED, 0, "ECX"): (
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - "
        "lwp fma4 tce - - - tbm topoext perfctr-core"
    ),
    (_EXTENDED, 0, "EDX"): (
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm 3dnowext "
        "3dnow"
    ),
    (0xD, 1, "EAX"): "xsaveopt xsavec xgetbv1 xsaves",
}


def about_cpu(machine: MachineFacts, offer: Offer) -> Iterator[Finding]:
    """Features that the guest would lose, and those it would not be shown though others would."""
    here, there = machine.cpuid, offer.cpuid
    if here is None or there is None:
        return
    lost, won = _beyond(here, there), _beyond(there, here)
    if lost:
        yield finding(
            "cpu.features-missing",
            f"the guest of {machine.name} sees features of its processor that {offer.host} would not show it: "
            f"{_told(lost)}",
            machine.name,
            "Choose a destination that shows them, or restart the machine with a more modest CPU model.",
        )
    if won:
        yield finding(
            "cpu.features-extra",
            f"{offer.host} would show features to a new guest that {machine.name} was not shown: {_told(won)}",
            machine.name,
        )


def _beyond(these: Mapping[CpuidKey, int], those: Mapping[CpuidKey, int]) -> list[str]:
    """The bits of one side that the other lacks."""
    found = []
    for key, bits in sorted(these.items()):
        left = bits & ~those.get(key, 0) & ~_OF_TOPOLOGY.get(key, 0)
        found += [_named(key, number) for number in range(32) if left >> number & 1]
    return found


def _named(key: CpuidKey, number: int) -> str:
    leaf, subleaf, register = key
    names = _NAMES.get(key, "").split()
    name = names[number] if number < len(names) and names[number] != "-" else ""
    place = f"CPUID {leaf:#x}" + (f".{subleaf}" if subleaf else "") + f" {register} bit {number}"
    return f"{name} ({place})" if name else place


def _told(bits: list[str]) -> str:
    more = f" and {len(bits) - MOST_NAMED} more" if len(bits) > MOST_NAMED else ""
    return ", ".join(bits[:MOST_NAMED]) + more
