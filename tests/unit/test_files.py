"""What a source shows of a machine's files and what a destination makes of it, with real files in two folders."""

from __future__ import annotations

import contextlib
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from dest_svc import files as destination
from dest_svc.admission import Refusal
from source_svc import files as source
from vmferry.config import HostConfig
from vmferry.errors import IncompatibleError
from vmferry.machines.fileidentity import Contents
from vmferry.machines.qemu.spec import DiskSpec, QemuSpec
from vmferry.machines.spec import MachineSpec, new_qemu_spec
from vmferry.negotiation.report import Severity
from vmferry.v1.compatibility_pb2 import FileIdentity


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "vmlinuz").write_bytes(b"kernel")
    (folder / "disk.raw").write_bytes(bytes(4096))
    return folder


def machine(root: Path, **disk: object) -> MachineSpec:
    """A machine with a kernel and a disk."""
    values = {"path": str(root / "disk.raw"), "format": "raw", "shared": True} | disk
    part = QemuSpec(kernel=str(root / "vmlinuz"), disks=(DiskSpec(**values),))  # type: ignore[arg-type]
    return new_qemu_spec("web", 16, 1, part)


def moved(spec: MachineSpec, root: Path) -> MachineSpec:
    """The same machine as a host with another folder of images would have it."""
    assert spec.qemu is not None
    disks = tuple(replace(disk, path=str(root / Path(disk.path).name)) for disk in spec.qemu.disks)
    return replace(spec, qemu=replace(spec.qemu, kernel=str(root / "vmlinuz"), disks=disks))


def beacons(folder: Path) -> list[str]:
    """Beacons in a folder."""
    return [path.name for path in folder.glob(".vmferry-*")]


async def judged(spec: MachineSpec, theirs: list[FileIdentity], root: Path) -> dict[str, Refusal]:
    """What a destination whose images lie in ``root`` makes of it, by id."""
    config = HostConfig(image_roots=(root,))
    found = await destination.file_refusals(moved(spec, root), theirs, config, Contents())
    assert all(refusal.message and refusal.remedy for refusal in found)
    by_id = {refusal.id: refusal for refusal in found if refusal.id != "disk.space"}
    assert len(by_id) == len([refusal for refusal in found if refusal.id != "disk.space"])
    return by_id


async def both(spec: MachineSpec, root: Path) -> dict[str, Refusal]:
    """The same, asked by a source on the other side."""
    async with source.shown(spec, Contents(), pid=None) as shown:
        assert shown.findings == []
        found = await judged(spec, shown.identities, root)
    assert beacons(root) == []
    return found


async def test_one_folder_seen_by_both_proves_the_disk(root: Path, tmp_path: Path) -> None:
    """Also under another name, through a link, where no kernel is in common."""
    assert await both(machine(root), root) == {}
    (tmp_path / "link").symlink_to(root)
    assert await both(machine(tmp_path / "link"), root) == {}
    async with source.shown(machine(root), Contents(), pid=None) as shown:
        for identity in shown.identities:
            identity.boot_id, identity.device = "another-boot", identity.device + 1
        assert await judged(machine(root), shown.identities, root) == {}


async def test_a_copy_of_a_disk_is_not_the_disk(root: Path, tmp_path: Path) -> None:
    """Same name, same content: the file number and the missing beacon tell; the kernel may be a copy."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("vmlinuz", "disk.raw"):
        (other / name).write_bytes((root / name).read_bytes())
    found = await both(machine(root), other)
    assert set(found) == {"disk.identity"}
    assert "file number" in found["disk.identity"].message
    assert "beacon" in found["disk.identity"].message
    assert found["disk.identity"].field == "qemu.disks[0].path"


async def test_a_disk_under_another_name_in_the_same_folder_is_not_the_disk(root: Path) -> None:
    """The beacon is seen, but the path leads to another image."""
    (root / "other.raw").write_bytes(bytes(4096))
    async with source.shown(machine(root), Contents(), pid=None) as shown:
        other = machine(root, path=str(root / "other.raw"))
        assert set(await judged(other, shown.identities, root)) == {"disk.identity"}


async def test_a_copy_that_differs_is_told(root: Path, tmp_path: Path) -> None:
    """A kernel and a disk that is only read, by content, whether their size is the same or not."""
    other = tmp_path / "other"
    other.mkdir()
    spec = machine(root, read_only=True, shared=False)
    (other / "vmlinuz").write_bytes(b"KERNEL")
    (other / "disk.raw").write_bytes(bytes(4096))
    found = await both(spec, other)
    assert [(one.id, one.field, one.severity) for one in found.values()] == [
        ("file.differs", "qemu.kernel", Severity.BLOCKS)
    ]
    (other / "vmlinuz").write_bytes(b"kernel")
    (other / "disk.raw").write_bytes(bytes(4097))
    found = await both(spec, other)
    assert [(one.id, one.field) for one in found.values()] == [("file.differs", "qemu.disks[0].path")]


async def test_a_local_disk_stays(root: Path) -> None:
    """Even where the other host sees it: nobody said that it is meant to be shared."""
    found = await both(machine(root, shared=False), root)
    assert set(found) == {"disk.not-shared"}
    assert "shared = true" in found["disk.not-shared"].remedy


async def test_a_source_of_an_older_release_shows_nothing(root: Path) -> None:
    """Its disks stay; for its kernel there is a warning."""
    found = await judged(machine(root), [], root)
    assert {one.id: one.severity for one in found.values()} == {
        "disk.identity": Severity.BLOCKS,
        "file.unverified": Severity.WARNS,
    }
    found = await judged(machine(root, read_only=True, shared=False), [], root)
    assert found["disk.identity"].severity is Severity.BLOCKS


async def test_files_outside_of_the_roots_are_not_looked_at(root: Path, tmp_path: Path) -> None:
    """Not even to compare them; that they may not be used is told elsewhere."""
    spec = machine(root)
    async with source.shown(spec, Contents(), pid=None) as shown:
        config = HostConfig(image_roots=(tmp_path / "nowhere",))
        assert await destination.file_refusals(spec, shown.identities, config, Contents()) == []


async def test_a_disk_that_cannot_be_written_to_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started, as the machine would open it."""
    asked = []

    def access(path: Path, mode: int, *, effective_ids: bool) -> bool:
        asked.append(mode)
        return not mode & os.W_OK

    monkeypatch.setattr(os, "access", access)  # root may do everything
    assert set(await both(machine(root), root)) == {"disk.no-access"}
    assert await both(machine(root, read_only=True), root) == {}
    assert asked == [os.R_OK | os.W_OK, os.R_OK]


async def test_a_disk_that_may_not_find_room_is_a_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only for images that can grow, on file systems that are nearly full."""
    system = namedtuple("system", "f_bavail f_frsize f_blocks")  # noqa: PYI024 - as os.statvfs has it
    config = HostConfig(image_roots=(root,))
    sparse, full = root / "sparse.raw", root / "disk.raw"
    with sparse.open("wb") as file:
        file.truncate(1 << 20)
    for free, path, told in ((10, sparse, True), (10, full, False), (1 << 20, sparse, False)):
        monkeypatch.setattr(os, "statvfs", lambda _path, free=free: system(free, 4096, 1 << 20))
        spec = machine(root, path=str(path))
        async with source.shown(spec, Contents(), pid=None) as shown:
            found = await destination.file_refusals(spec, shown.identities, config, Contents())
        assert [(one.id, one.severity) for one in found] == ([("disk.space", Severity.WARNS)] if told else [])


async def test_an_image_that_names_other_files_stays(root: Path) -> None:
    """QEMU would open them for the guest, wherever they lie."""
    (root / "disk.raw").write_bytes(b"not an image")
    assert "disk.image" in await both(machine(root, format="qcow2"), root)


async def test_what_cannot_be_shown_is_told_with_its_reason(root: Path) -> None:
    """A disk that is gone blocks, a kernel that is gone is a warning; an attempt does not begin."""
    (root / "disk.raw").unlink()
    (root / "vmlinuz").unlink()
    async with source.shown(machine(root), Contents(), pid=None) as shown:
        assert shown.identities == []
        assert [(one.id, one.severity) for one in shown.findings] == [
            ("file.unverified", Severity.WARNS),
            ("disk.identity", Severity.BLOCKS),
        ]
        assert all("No such file" in one.message for one in shown.findings)
        with pytest.raises(IncompatibleError, match=r"disk\.identity"):
            shown.check()


async def test_a_disk_that_was_replaced_is_found_out(root: Path) -> None:
    """The machine has another file open than the one its path leads to."""
    with (root / "disk.raw").open("rb"):
        async with source.shown(machine(root), Contents(), pid=os.getpid()) as shown:
            assert shown.findings == []
        (root / "disk.raw").rename(root / "old.raw")
        (root / "disk.raw").write_bytes(bytes(4096))
        async with source.shown(machine(root), Contents(), pid=os.getpid()) as shown:
            assert [one.id for one in shown.findings] == ["disk.replaced"]


async def test_beacons_go_whatever_happens(root: Path) -> None:
    """A caller that fails meanwhile leaves none, and disks in one folder share one."""
    spec = machine(root)
    assert spec.qemu is not None
    (root / "two.raw").write_bytes(bytes(10))
    second = DiskSpec(path=str(root / "two.raw"), format="raw", shared=True)
    spec = replace(spec, qemu=replace(spec.qemu, disks=(*spec.qemu.disks, second)))
    with contextlib.suppress(ZeroDivisionError):
        async with source.shown(spec, Contents(), pid=None) as shown:
            assert len(beacons(root)) == 1
            assert len({identity.beacon for identity in shown.identities if identity.beacon}) == 1
            raise ZeroDivisionError
    assert beacons(root) == []
