"""The Linux guest of demonstrations and tests: the archive it boots from, and how what it says is judged."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import InvalidArgumentError
from vmferry.machines.qemu.guest import Entry, append, archive, initramfs, modules_of, newest_kernel
from vmferry.machines.qemu.guest.verdict import verdict

FIELDS = (
    "ino",
    "mode",
    "uid",
    "gid",
    "nlink",
    "mtime",
    "size",
    "major",
    "minor",
    "rmajor",
    "rminor",
    "name",
    "check",
)
entries = st.lists(
    st.builds(
        Entry,
        name=st.text("abc/", min_size=1, max_size=9),
        mode=st.integers(0, 0o177777),
        data=st.binary(max_size=9),
        device=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    ),
    max_size=4,
)


def unpacked(data: bytes) -> list[Entry]:
    """Read an archive as the kernel's documentation describes it."""
    found, at = [], 0
    while True:
        assert data[at : at + 6] == b"070701"
        numbers = [int(data[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        head = dict(zip(FIELDS, numbers, strict=True))
        name = data[at + 110 : at + 110 + head["name"]]
        start = (at + 110 + head["name"] + 3) // 4 * 4
        at = (start + head["size"] + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(data)
            return found
        assert name.endswith(b"\0")
        content = data[start : start + head["size"]]
        found.append(Entry(name[:-1].decode(), head["mode"], content, (head["rmajor"], head["rminor"])))


@given(entries)
def test_an_archive_is_what_the_kernel_reads(files: list[Entry]) -> None:
    """Whatever the names, sizes and modes, the format's own rules find every file again."""
    assert unpacked(archive(files)) == files


def test_the_guests_file_system_holds_what_it_needs(tmp_path: Path) -> None:
    """The shell, the script as the first process, and the console it speaks on."""
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"\x7fELF static")
    found = {entry.name: entry for entry in unpacked(initramfs(busybox))}
    assert found["bin/busybox"].data == b"\x7fELF static"
    assert found["init"].data.startswith(b"#!/bin/busybox sh\n")
    assert found["init"].mode == 0o100755
    assert (found["dev/console"].mode, found["dev/console"].device) == (0o020600, (5, 1))
    assert append(3, 4).endswith("vf.files=3 vf.writes=4")
    assert append(3, 4, "vda").endswith(" vf.disk=vda")


def test_modules_come_behind_what_they_need(tmp_path: Path) -> None:
    """However they are packed and whatever depends on what; what is built into the kernel has no file."""
    root = tmp_path / "6.1.0-x"
    root.mkdir()
    (root / "modules.dep").write_text(
        "k/a-b.ko: k/c.ko.xz k/d.ko.gz\nk/c.ko.xz: k/d.ko.gz\nk/d.ko.gz:\nk/e.ko.zst:\n"
    )
    (root / "k").mkdir()
    (root / "k/a-b.ko").write_bytes(b"a")
    (root / "k/c.ko.xz").write_bytes(lzma.compress(b"c"))
    (root / "k/d.ko.gz").write_bytes(gzip.compress(b"d"))
    (root / "k/e.ko.zst").write_bytes(b"e")
    kernel = tmp_path / "vmlinuz-6.1.0-x"
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"\x7fELF static")
    found = modules_of(kernel, ["a_b", "built_in", "c"], tmp_path)
    assert [path.name for path in found] == ["d.ko.gz", "c.ko.xz", "a-b.ko"]
    entries = unpacked(initramfs(busybox, found))
    assert [entry.data for entry in entries if entry.name.startswith("modules/")] == [b"d", b"c", b"a"]
    with pytest.raises(InvalidArgumentError, match="packed"):
        initramfs(busybox, modules_of(kernel, ["e"], tmp_path))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """No busybox, one that needs libraries, and no kernel are told with what to install."""
    linked = tmp_path / "linked"
    linked.write_bytes(b"\x7fELF /lib64/ld-linux-x86-64.so.2")
    for busybox in (tmp_path / "missing", linked):
        with pytest.raises(InvalidArgumentError) as caught:
            initramfs(busybox)
        assert "busybox-static" in caught.value.instance_remedy
    with pytest.raises(InvalidArgumentError) as caught:
        newest_kernel(tmp_path)
    assert "linux-image" in caught.value.instance_remedy


GOOD = """ready files=2
tick n=1 up=2.00 gap=10 wall=5 bad=0
tick n=2 up=2.10 gap=10 wall=5 bad=0
check n=1 begun=1 bad=0
disk n=7 name=f7 md5=0123456789abcdef0123456789abcdef bad=0
tick n=3 up=2.20 gap=10 wall=5 bad=0
"""


def test_a_good_guest_is_well() -> None:
    """Counting on, with a clock that goes forward and no fault, and what it checked is known."""
    found = verdict(GOOD + "tick n=4 up=2.3")
    assert found.ok
    assert found.ready
    assert [tick.number for tick in found.ticks] == [1, 2, 3]
    assert found.ticks[0].uptime_cs == 200
    assert [(file.number, file.name, file.md5[:4]) for file in found.written] == [(7, "f7", "0123")]
    assert found.checked_after(1)
    assert not found.checked_after(2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tick n=2", "tick n=3"),
        ("up=2.20", "up=2.05"),
        ("up=2.20 gap=10 wall=5 bad=0", "up=2.20 gap=10 wall=5 bad=1"),
        ("begun=1 bad=0", "begun=1 bad=2"),
        ("check n=1", "BAD files: 1: FAILED\ncheck n=1"),
        ("check n=1", "[    9.1] Kernel panic - not syncing\ncheck n=1"),
        ("check n=1", "[    9.1] EXT4-fs error (device vda): bad block\ncheck n=1"),
        ("check n=1", f"disk n=0 name=f0 md5={'0' * 32} bad=1\ncheck n=1"),
        ("check n=1", "[    9.1] BUG: unable to handle page fault\ncheck n=1"),
        (GOOD, ""),
    ],
)
def test_every_fault_is_seen(old: str, new: str) -> None:
    """A hole in the count, a clock that goes back, a fault that anybody names, and silence are not health."""
    assert not verdict(GOOD.replace(old, new)).ok
