"""What a QEMU tells of its guest's processor: the words that the guest reads when it executes CPUID.

Promise: pure; words without any feature are left out, so that releases which know more words compare with those that
know fewer.
"""

from __future__ import annotations

from typing import Any

from vmferry.negotiation.facts import CpuidKey

PROPERTY = "feature-words"
"""The property of a processor, as QEMU names it."""


def words(answer: list[dict[str, Any]]) -> dict[CpuidKey, int]:
    """The answer to ``qom-get`` of the property.

    Raises:
        KeyError, TypeError, ValueError: it is not what a QEMU answers.
    """
    found = {
        (int(word["cpuid-input-eax"]), int(word.get("cpuid-input-ecx", 0)), str(word["cpuid-register"])): int(
            word["features"]
        )
        for word in answer
    }
    return {key: bits for key, bits in found.items() if bits}
