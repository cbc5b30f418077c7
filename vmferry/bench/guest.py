"""The guest that is moved: a kernel and one program that ticks, holds known content, and writes at a given rate.

Promise: the same wishes give the same guest, for whoever moves it. Real files are files of this computer, each from
the beginning of a page as in a page cache, so that they compress and repeat as real ones do.
"""

from __future__ import annotations

import enum
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import InvalidArgumentError
from vmferry.machines.qemu.guest import APPEND, LOAD, Entry, newest_kernel, pieces
from vmferry.machines.qemu.probe import probe_binary, resolve
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.spec import MachineSpec, new_qemu_spec

KERNEL_MIB: Final = 96
"""What the kernel takes to boot."""
FILE_ROOTS: Final = (Path("/usr/lib"), Path("/lib"))

_MIB: Final = 1024 * 1024
_PAGE: Final = 4096
# The program asks the keyboard's controller by itself.
_APPEND: Final = f"{APPEND} initcall_blacklist=i8042_init"
# Otherwise what the kernel unpacked from would stay in free memory, a second copy of all files.
_FORGET: Final = "init_on_free=1"


class Load(enum.StrEnum):
    """What the guest does."""

    IDLE = "idle"
    FILES = "files"
    WRITER = "writer"


@dataclass(frozen=True)
class Wishes:
    """What guest to make."""

    load: Load = Load.IDLE
    memory_mib: int = 2048
    resident_mib: int = 1100
    """Random content, which cannot be compressed."""
    files_mib: int = 0
    """Real files."""
    rate_mib_per_s: int = 0
    set_mib: int = 0
    """What the writer goes over again and again."""
    kernel: Path | None = None

    @property
    def name(self) -> str:
        """What it is called in a table."""
        words = {
            Load.IDLE: f"idle, {self.resident_mib} MiB random",
            Load.FILES: f"page cache, {self.files_mib} MiB of files",
            Load.WRITER: f"writes {self.rate_mib_per_s} MiB/s in {self.set_mib} MiB",
        }[self.load]
        return f"{self.memory_mib} MiB, {words}"

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            InvalidArgumentError: by the option at fault.
        """
        # The kernel holds the files twice while it unpacks them.
        needed = KERNEL_MIB + self.resident_mib + 2 * self.files_mib + self.set_mib
        if needed > self.memory_mib:
            raise InvalidArgumentError(
                f"the guest has {self.memory_mib} MiB, and what it is to hold needs {needed}",
                field="--memory-mib",
                remedy="Choose more of it, or less of --resident-mib, --files-mib or --working-set-mib.",
            )
        if self.load is Load.WRITER and not (self.rate_mib_per_s and self.set_mib):
            raise InvalidArgumentError("a writer needs a rate and a working set", field="--dirty-mib-per-s")


def make_spec(wishes: Wishes, folder: Path, accelerator: str) -> MachineSpec:
    """The machine, with its kernel and initial file system in a folder.

    Raises:
        InvalidArgumentError: there is no kernel, or the accelerator does not work here.
        MachineFailedError: there is no QEMU.
    """
    probe_binary(QemuSpec.binary)
    kernel, initrd = folder / "vmlinuz", folder / "initrd"
    shutil.copyfile(wishes.kernel or newest_kernel(), kernel)
    with initrd.open("wb") as file:
        file.writelines(pieces(_entries(wishes)))
    append = f"{_APPEND} vf_resident={wishes.resident_mib}"
    if wishes.files_mib:
        append += f" {_FORGET}"
    if wishes.load is Load.WRITER:
        append += f" vf_rate={wishes.rate_mib_per_s} vf_set={wishes.set_mib}"
    part = QemuSpec(kernel=str(kernel), initrd=str(initrd), append=append, accelerator=accelerator)
    return resolve(new_qemu_spec("bench", wishes.memory_mib, 1, part))


def _entries(wishes: Wishes) -> Iterator[Entry]:
    yield Entry("dev", stat.S_IFDIR | 0o755)
    # The kernel opens it for the first process before anything can be mounted.
    yield Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield Entry("init", stat.S_IFREG | 0o755, LOAD.read_bytes())
    if wishes.files_mib:
        yield Entry("files", stat.S_IFREG | 0o644, real_files(wishes.files_mib * _MIB))


def real_files(size_bytes: int, roots: tuple[Path, ...] = FILE_ROOTS) -> bytes:
    """So many bytes of installed libraries, and of other files where these are not enough.

    Raises:
        InvalidArgumentError: there is not that much.
    """
    content = bytearray()
    for path in sorted(_regular(roots), key=lambda path: (".so" not in path.name, path)):
        try:
            content += path.read_bytes()
        except OSError:
            continue
        content += bytes(-len(content) % _PAGE)
        if len(content) >= size_bytes:
            return bytes(content[:size_bytes])
    raise InvalidArgumentError(
        f"there are only {len(content) // _MIB} MiB of files in {', '.join(map(str, roots))}",
        field="--files-mib",
    )


def _regular(roots: tuple[Path, ...]) -> set[Path]:
    found = set()
    for root in roots:
        # /lib is a link to /usr/lib on many systems, and each file counts once.
        for folder, _, names in os.walk(root.resolve()):
            paths = (Path(folder, name) for name in names)
            found |= {path for path in paths if path.is_file() and not path.is_symlink()}
    return found
