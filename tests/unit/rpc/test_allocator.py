"""Buffers that are used again: what a service asks of the C library."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from vmferry.rpc.allocator import keep_buffers
if sys.argv[1] == "kept":
    keep_buffers()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
piece = b"x" * (2 << 20)
def window():
    return [bytearray(piece) for _ in range(8)]
window()
before = faults()
for _ in range(10):
    window()
print(faults() - before)
"""


@pytest.fixture(scope="module")
def faults() -> dict[str, int]:
    """Page faults of ten windows of eight messages of 2 MiB, in a process with the setting and in one without."""
    found = {}
    for how in ("kept", "default"):
        told = subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True)
        found[how] = int(told.stdout)
    return found


def test_a_buffer_that_was_freed_is_used_again(faults: dict[str, int]) -> None:
    """Ten windows of messages cost fewer page faults than the pages of a single message; by default, far more."""
    assert faults["kept"] < (2 << 20) // 4096
    assert faults["default"] > 10 * faults["kept"]
