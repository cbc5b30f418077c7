"""A Linux guest that checks itself: an initial file system made of a busybox and ``init.sh``.

For benchmarks there is ``load.S``, a program that is all of a guest's own; what it does is said there.

Promise: :func:`archive` is pure, and the same files give the same bytes; only what Linux itself brings is needed, no
tool that packs archives. What the guest says is read by ``verdict``.
"""

from __future__ import annotations

import gzip
import itertools
import lzma
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from vmferry.errors import InvalidArgumentError

APPEND: Final = "console=ttyS0 quiet loglevel=3 panic=-1 cryptomgr.notests"
"""Without the kernel's tests of its ciphers, which the guest does not use, it is there a fifth earlier under TCG."""
BUSYBOX: Final = Path("/bin/busybox")
LOAD: Final = Path(__file__).with_name("load.bin")
"""The only program of the guest that benchmarks move."""

DISK_MODULES: Final = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
"""What a guest with a virtio disk needs, unless it is built into its kernel."""

_UNPACK: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".ko": bytes,
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
}
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
    return b"".join(pieces(entries))


def pieces(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The same in pieces, for what is too large to be held twice."""
    for number, entry in enumerate(itertools.chain(entries, [Entry(_TRAILER, 0)]), start=1):
        name = entry.name.encode() + b"\0"
        major, minor = entry.device
        # inode, mode, uid, gid, links, mtime, size, device major and minor, rdev major and minor, name size, check
        numbers = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % value for value in numbers) + name
        yield header + bytes(-len(header) % 4)
        yield entry.data
        yield bytes(-len(entry.data) % 4)


def initramfs(busybox: Path = BUSYBOX, modules: Iterable[Path] = ()) -> bytes:
    """The guest's whole file system.

    Args:
        busybox: the one program in it.
        modules: of the kernel, to be loaded in this order.

    Raises:
        InvalidArgumentError: there is no statically linked busybox, or a module is packed in an unknown way.
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
            *_loaded(modules),
        ]
    )


def _loaded(modules: Iterable[Path]) -> Iterator[Entry]:
    for number, path in enumerate(modules):
        unpack = _UNPACK.get(path.suffix)
        if unpack is None:
            raise InvalidArgumentError(
                f"{path} is packed in a way that is not known here",
                field="modules",
                remedy=f"Use a kernel whose modules end in one of {', '.join(_UNPACK)}.",
            )
        yield Entry(f"modules/{number:02}.ko", stat.S_IFREG | 0o644, unpack(path.read_bytes()))


def modules_of(kernel: Path, names: Iterable[str], folder: Path = Path("/lib/modules")) -> list[Path]:
    """The files of some modules of a kernel and of all they need, each behind what it needs.

    Args:
        kernel: such as ``/boot/vmlinuz-6.1.0``; the rest of its name is the release.
        names: of the modules; what is built into the kernel has no file.
        folder: where the modules of all releases lie.
    """
    root = folder / kernel.name.partition("-")[2]
    needs = {}
    for line in (root / "modules.dep").read_text(encoding="utf-8").splitlines():
        file, _, others = line.partition(":")
        needs[file] = others.split()
    by_name = {file.rsplit("/", 1)[-1].split(".")[0].replace("-", "_"): file for file in needs}
    found: dict[str, None] = {}

    def take(file: str) -> None:
        for other in needs[file]:
            if other not in found:
                take(other)
        found[file] = None

    for name in names:
        if name in by_name:
            take(by_name[name])
    return [root / file for file in found]


def append(files: int, writes_mib_per_s: int, disk: str = "") -> str:
    """The kernel's command line for the guest."""
    on_disk = f" vf.disk={disk}" if disk else ""
    return f"{APPEND} vf.files={files} vf.writes={writes_mib_per_s}{on_disk}"


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


def _no_busybox(fault: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        fault,
        field="busybox",
        remedy="Install a statically linked busybox (on Debian: apt install busybox-static).",
    )
