"""Buffers that are used again: what a service asks of the C library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

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


@pytest.mark.skipif(
    not HUGE.exists() or "[never]" in HUGE.read_text(), reason="this kernel has no huge pages to give"
)
def test_buffers_are_asked_for_in_huge_pages() -> None:
    """The part of the heap that a service's windows fit into has the advice; nothing is touched for that."""
    advised = r"VmFlags:.* hg"
    assert _heap_kib("keep_buffers()", "Size", advised) >= 96 * 1024
    assert _heap_kib("keep_buffers()", "Rss", advised) < 8 * 1024


def test_buffers_can_be_touched_before_they_are_needed() -> None:
    """As much of them as is asked for is there then, and no more."""
    before, after = (_heap_kib(f"keep_buffers(); touch_buffers({size})", "Rss") for size in (0, 64 << 20))
    assert 60 * 1024 < after - before < 70 * 1024


ONE_HEAP = """
import ctypes, threading
import {module}
threads = [threading.Thread(target=lambda: bytes(300_000)) for _ in range(8)]
for one in threads: one.start()
for one in threads: one.join()
library = ctypes.CDLL(None)
library.fdopen.restype = ctypes.c_void_p
told = ctypes.c_void_p(library.fdopen(1, b"w"))
library.malloc_info(0, told)
library.fflush(told)
"""
"""What the C library tells of a program's memory, when threads have used some."""


@pytest.mark.parametrize("module", ["source_svc.__main__", "dest_svc.__main__", "vmferry.bench.pump"])
def test_all_threads_of_a_service_use_one_heap(module: str) -> None:
    """Also those that gRPC starts when it is loaded: with a heap of their own, each keeps what others lack."""
    script = ONE_HEAP.format(module=module)
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert told.count("<heap nr=") == 1


def _heap_kib(statement: str, field: str, having: str = "") -> int:
    """What the kernel says of the parts of a new process's heap that look so, when it has executed a statement."""
    script = f"from vmferry.rpc.allocator import *; {statement}; print(open('/proc/self/smaps').read())"
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", told)
    return sum(_kib(part, field) for part in parts if "[heap]" in part and re.search(having, part))


def _kib(part: str, field: str) -> int:
    found = re.search(rf"^{field}: +(\d+) kB", part, re.MULTILINE)
    assert found is not None
    return int(found[1])
