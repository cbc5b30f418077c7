"""A Linux guest that checks itself: an initial file system made of a busybox and ``init.sh``.

Promise: :func:`archive` is pure, and the same files give the same bytes; only what Linux itself brings is needed, no
tool that packs archives. What the guest says is read by ``verdict``.
"""

from __future__ import annotations

import lzma
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from vmferry.errors import InvalidArgumentError

APPEND: Final = "console=ttyS0 quiet loglevel=3 panic=-1"
BUSYBOX: Final = Path("/bin/busybox")
MODULES: Final = Path("/lib/modules")

_TRAILER: Final = "TRAILER!!!"
_ELF_DYNAMIC: Final = b"/lib64/ld-linux-x86-64.so.2"


@dataclass(frozen=True)
class Entry:
    """One file of an archive."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def archive(entries: Iterable[Entry]) -> bytes:
    """A cpio archive in the format ``newc``, which the kernel unpacks as its first file system."""
    out = bytearray()
    for number, entry in enumerate([*entries, Entry(_TRAILER, 0)], start=1):
        name = entry.name.encode() + b"\0"
        major, minor = entry.device
        # inode, mode, uid, gid, links, mtime, size, device major and minor, rdev major and minor, name size, check
        numbers = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % value for value in numbers) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(busybox: Path = BUSYBOX, modules: Sequence[Path] = ()) -> bytes:
    """The guest's whole file system.

    Args:
        busybox: all its programs.
        modules: of the kernel, loaded in this order before anything else (see :func:`find_modules`).

    Raises:
        InvalidArgumentError: there is no statically linked busybox.
    """
    try:
        shell = busybox.read_bytes()
    except OSError as error:
        raise _no_busybox(f"cannot read {busybox}: {error.strerror}") from error
    if _ELF_DYNAMIC in shell:
        raise _no_busybox(f"{busybox} is not linked statically")
    script = resources.files(__name__).joinpath("init.sh").read_bytes()
    return archive(
        [
            Entry("dev", stat.S_IFDIR | 0o755),
            # The kernel opens it for the first process before anything can be mounted.
            Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
            Entry("dev/urandom", stat.S_IFCHR | 0o666, device=(1, 9)),
            Entry("bin", stat.S_IFDIR | 0o755),
            Entry("bin/busybox", stat.S_IFREG | 0o755, shell),
            Entry("init", stat.S_IFREG | 0o755, script),
            Entry("modules", stat.S_IFDIR | 0o755),
            *(
                Entry(f"modules/{number:02}-{_module_name(path)}.ko", stat.S_IFREG | 0o644, _unpacked(path))
                for number, path in enumerate(modules)
            ),
        ]
    )


def find_modules(names: Sequence[str], release: str) -> list[Path]:
    """The files of a kernel's modules, each behind those that it needs; what the kernel has built in is left out.

    Raises:
        InvalidArgumentError: that kernel has no such module.
    """
    root = MODULES / release
    try:
        lines = (root / "modules.dep").read_text(encoding="utf-8").splitlines()
        built_in = (root / "modules.builtin").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise _no_module(f"cannot read {error.filename}: {error.strerror}") from error
    needs = {file: needed.split() for file, _, needed in (line.partition(":") for line in lines)}
    files = {_module_name(Path(file)): file for file in needs}
    ready_made = {_module_name(Path(file)) for file in built_in}
    found: list[str] = []
    for name in names:
        if name in ready_made:
            continue
        if name not in files:
            raise _no_module(f"the kernel {release} has no module {name}")
        # Those that are needed stand there with the one that needs nothing else last.
        for file in [*reversed(needs[files[name]]), files[name]]:
            if file not in found:
                found.append(file)
    return [root / file for file in found]


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _unpacked(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def append(files: int, writes_mib_per_s: int) -> str:
    """The kernel's command line for the guest."""
    return f"{APPEND} vf.files={files} vf.writes={writes_mib_per_s}"


def newest_kernel(folder: Path = Path("/boot")) -> Path:
    """The kernel that was installed last.

    Raises:
        InvalidArgumentError: there is none that can be read.
    """
    kernels = sorted(folder.glob("vmlinuz*"), key=lambda path: path.stat().st_mtime)
    for kernel in reversed(kernels):
        try:
            with kernel.open("rb"):
                return kernel
        except OSError:
            continue
    raise InvalidArgumentError(
        f"there is no kernel in {folder} that can be read",
        field="--kernel",
        remedy="Name one, or install one (on Debian: apt install linux-image-cloud-amd64).",
    )


def _no_module(fault: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        fault, field="modules", remedy="Name a kernel whose modules are installed here, and modules it has."
    )


def _no_busybox(fault: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        fault,
        field="busybox",
        remedy="Install a statically linked busybox (on Debian: apt install busybox-static).",
    )
