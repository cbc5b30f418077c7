"""What kinds of guest memory a destination offers, and how much of each; what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dest_svc.admission import refusals
from dest_svc.offer import left_for_newcomers
from tests.hugepages import huge_folder
from vmferry.config import HostConfig
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.spec import new_qemu_spec
from vmferry.memory.hugepages import HUGE_PAGE_BYTES
from vmferry.memory.runs import PAGE_SIZE

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def huge() -> Iterator[Path]:
    """A hugetlbfs with a little memory."""
    with huge_folder(16) as folder:
        yield folder


def offered(config: HostConfig) -> dict[str, tuple[int, int]]:
    """Page size and available bytes of each kind."""
    return {
        backing.name: (backing.page_bytes, backing.available_bytes)
        for backing in left_for_newcomers(config, ())
    }


def refused(config: HostConfig, backing: str) -> list[str]:
    """The ids of what stands in the way of a machine, as far as its memory is concerned."""
    spec = new_qemu_spec("web", 16, 1, QemuSpec(memory_backing=backing))
    return [refusal.id for refusal in refusals(spec, config) if refusal.field == "qemu.memory_backing"]


def test_huge_pages_are_offered_where_they_are(huge: Path) -> None:
    """With their page size and what the kernel promised to nobody, whatever headroom other memory needs."""
    found = offered(
        HostConfig(ram_dir=Path("/dev/shm"), huge_dir=huge / "later", memory_headroom_mib=1 << 40)
    )
    assert found["hugetlbfs"] == (HUGE_PAGE_BYTES, 16 * MIB)
    assert {found[name] for name in ("tmpfs", "memfd", "anonymous")} == {(PAGE_SIZE, 0)}


@pytest.mark.parametrize("setting", [{}, {"huge_dir": Path("/dev/shm")}])
def test_a_host_without_huge_pages_says_so(setting: dict[str, Path]) -> None:
    """It does not offer them, and refuses a machine that needs them by the field; other kinds it makes."""
    config = HostConfig(ram_dir=Path("/dev/shm"), memory_headroom_mib=0, **setting)  # type: ignore[arg-type]
    found = offered(config)
    assert sorted(found) == ["anonymous", "memfd", "tmpfs"]
    assert all(available > 0 for _, available in found.values())
    assert refused(config, "hugetlbfs") == ["memory.backing"]
    assert [refused(config, name) for name in found] == [[], [], []]


def test_a_host_with_huge_pages_refuses_none_who_needs_them(huge: Path) -> None:
    """The folder need not exist yet."""
    assert refused(HostConfig(huge_dir=huge / "later"), "hugetlbfs") == []
