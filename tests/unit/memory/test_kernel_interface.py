"""What is agreed with the kernel: sizes of structures, numbers, and the page map's older format."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.memory import pagemap, ptrace, userfault
from vmferry.memory.pagemap import soft_dirty_runs
from vmferry.memory.runs import PageRuns

SOFT_DIRTY, PRESENT, SWAPPED, FILE_BACKED = 1 << 55, 1 << 63, 1 << 62, 1 << 61


@pytest.mark.parametrize(
    ("request_number", "argument", "size"),
    [
        (pagemap.PAGEMAP_SCAN, pagemap.SCAN_ARGUMENT, 96),
        (userfault.UFFDIO_API, userfault.API_ARGUMENT, 24),
        (userfault.UFFDIO_REGISTER, userfault.REGISTER_ARGUMENT, 32),
    ],
)
def test_an_argument_has_the_size_its_request_encodes(
    request_number: int, argument: struct.Struct, size: int
) -> None:
    """The kernel reads and writes as many bytes as the request number says; the buffer must have them."""
    assert argument.size == size == request_number >> 16 & 0x3FFF


def test_the_register_set_is_that_of_x86_64() -> None:
    """27 registers of 64 bits, each named once."""
    assert len(set(ptrace.REGISTERS)) == 27
    assert ptrace.REGISTER_SET.size == 216


@given(
    st.lists(st.sampled_from([0, FILE_BACKED, PRESENT, PRESENT | SOFT_DIRTY, SWAPPED, SWAPPED | SOFT_DIRTY]))
)
def test_soft_dirty_pages_and_unmapped_pages_are_told_from_clean_ones(entries: list[int]) -> None:
    """Bit 55 means written; neither present nor swapped means that nothing is known."""
    numbered = [entry | page for page, entry in enumerate(entries)]
    dirty, absent = soft_dirty_runs(struct.pack(f"={len(numbered)}Q", *numbered))
    assert dirty == PageRuns((page, 1) for page, entry in enumerate(entries) if entry & SOFT_DIRTY)
    assert absent == PageRuns((page, 1) for page, entry in enumerate(entries) if entry in (0, FILE_BACKED))
