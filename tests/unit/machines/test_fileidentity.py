"""Whether two hosts have the same file: what counts as proof, and when a content is read again."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from vmferry.machines import fileidentity
from vmferry.machines.fileidentity import Contents, differences, files_of, identify
from vmferry.machines.qemu.spec import DiskSpec, QemuSpec
from vmferry.v1.compatibility_pb2 import FileIdentity


def identity(**changes: object) -> FileIdentity:
    """A file as a host tells it."""
    values: dict[str, object] = {"size_bytes": 100, "boot_id": "x", "device": 5, "inode": 7} | changes
    return FileIdentity(field="qemu.disks[0].path", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("theirs", "beacon", "grows", "told"),
    [
        ({}, "", False, []),
        ({"boot_id": "y", "device": 6}, "", False, []),
        ({"size_bytes": 90}, "", True, []),
        ({"size_bytes": 90}, "", False, ["90 bytes"]),
        ({"device": 6}, "", False, ["device 0x6"]),
        ({"boot_id": "y", "inode": 8}, "", False, ["file number 8"]),
        ({}, "no light", False, ["no light"]),
        ({"inode": 8, "size_bytes": 90}, "no light", False, ["file number 8", "90 bytes", "no light"]),
        ({"inode": 0}, "", False, ["does not say"]),
    ],
)
def test_what_speaks_against_one_file(
    theirs: dict[str, object], beacon: str, grows: bool, told: list[str]
) -> None:
    """Number, size and beacon, each by name; device numbers count within one kernel only."""
    found = differences(identity(**theirs), identity(), beacon_problem=beacon, may_grow=grows)
    assert len(found) == len(told)
    assert all(words in phrase for words, phrase in zip(told, found, strict=True))


def test_the_same_boot_is_no_proof() -> None:
    """A copy of a running virtual host has its boot, devices and file numbers, and other files."""
    assert differences(identity(), identity(), beacon_problem="no light", may_grow=False) == ["no light"]


def test_which_files_must_be_the_same() -> None:
    """Disks that are written to or said to be shared; of the rest an equal copy will do."""
    disks = [
        DiskSpec(path=f"/images/{number}", format="raw", read_only=number > 1, shared=number % 2 == 1)
        for number in range(4)
    ]
    found = files_of(QemuSpec(kernel="/images/vmlinuz", disks=tuple(disks)))
    assert [(file.field, file.must_be_same) for file in found] == [
        ("qemu.kernel", False),
        ("qemu.disks[0].path", True),
        ("qemu.disks[1].path", True),
        ("qemu.disks[2].path", False),
        ("qemu.disks[3].path", True),
    ]


def test_only_regular_files_have_an_identity(tmp_path: Path) -> None:
    """A folder and a device are refused."""
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match="regular"):
            identify("qemu.kernel", path)


async def test_a_content_is_read_again_once_it_changed(tmp_path: Path) -> None:
    """Also if size and time of change are put back; else it is remembered, and read no more."""
    path, contents = tmp_path / "file", Contents()
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    assert await contents.sha256(path) == hashlib.sha256(b"one").digest()
    path.write_bytes(b"two")
    os.utime(path, (1, 1))
    assert await contents.sha256(path) == hashlib.sha256(b"two").digest()


async def test_a_settled_content_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second question costs no reading, until the file changes."""
    monkeypatch.setattr(fileidentity, "_SETTLED_S", -1.0)  # instead of waiting until it is old
    path, contents = tmp_path / "file", Contents()
    path.write_bytes(b"one")
    first = await contents.sha256(path)
    monkeypatch.setattr(hashlib, "sha256", None)
    assert await contents.sha256(path) == first
    monkeypatch.undo()
    path.write_bytes(b"two")
    assert await contents.sha256(path) != first


async def test_a_reading_that_is_given_up_ends(tmp_path: Path) -> None:
    """A caller that goes away does not leave a thread behind that reads a large file to its end."""
    path, contents = tmp_path / "large", Contents()
    with path.open("wb") as file:
        file.truncate(fileidentity.MAX_HASHED_BYTES)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await contents.sha256(path)
    small = tmp_path / "small"
    small.write_bytes(b"one")
    async with asyncio.timeout(60):
        assert await contents.sha256(small) == hashlib.sha256(b"one").digest()


async def test_what_is_too_large_or_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe without a writer does not hold anybody up either."""
    large, pipe = tmp_path / "large", tmp_path / "pipe"
    with large.open("wb") as file:
        file.truncate(fileidentity.MAX_HASHED_BYTES + 1)
    os.mkfifo(pipe)
    for path in (large, pipe, tmp_path / "missing"):
        async with asyncio.timeout(60):
            with pytest.raises(OSError, match=r"compared by content|No such file"):
                await Contents().sha256(path)
