"""A host's disk: what programs see, what would be left after a crash, and when the two differ.

A write is seen at once and is durable after the next sync of its file that works. After a sync that fails the pages
count as clean: they are still seen, and no later sync brings them to disk. A name is durable after a sync of its
folder. A crash keeps, loses or tears what was not durable.
"""

from __future__ import annotations

import errno
import fnmatch
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from tests.simulation.cluster.clock import Process, WouldBlockError
from vmferry.handoff.disk import File, Lock

SECTOR_BYTES: Final = 512
MOUNT: Final = Path("/host")
_IDENTITIES: Final = itertools.count()
Step = Callable[[str, str], str]
"""Told before each call that changes something: its kind and the file; the answer names an error, or is empty."""


class Node:
    """A file, or a folder."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.durable = bytearray()
        self.dirty: list[tuple[int, bytes]] = []
        self.allocated = 0
        self.holder: Process | None = None
        self.identity = f"node {next(_IDENTITIES)}"

    def bring(self, writes: Iterable[tuple[int, bytes]]) -> None:
        """Make writes durable."""
        for offset, data in writes:
            if len(self.durable) < offset:
                self.durable.extend(bytes(offset - len(self.durable)))
            self.durable[offset : offset + len(data)] = data


class HostDisk:
    """What survives the crash of one host, and what does not."""

    def __init__(self) -> None:
        self.full = False
        self.names: dict[Path, Node] = {}
        self.durable_names: dict[Path, Node] = {}
        self.names[MOUNT] = self.durable_names[MOUNT] = Node()
        self.versions: Counter[Path] = Counter()
        """Grow with each change of a file."""
        self.watch: Callable[[Path], None] = lambda path: None

    def changed(self, path: Path) -> None:
        """A file has changed."""
        self.versions[path] += 1
        self.watch(path)

    def crash(self, how: str) -> None:
        """Lose what is not durable: ``keep`` loses nothing, ``torn`` tears the last write of each file."""
        if how == "lose":
            self.names = {
                path: node
                for path, node in self.durable_names.items()
                if all(folder in self.durable_names for folder in path.parents if folder.parts[1:2])
            }
        for node in self.names.values():
            if how != "lose":
                node.bring(node.dirty[:-1])
                node.bring(
                    (at, data[:SECTOR_BYTES] if how == "torn" else data) for at, data in node.dirty[-1:]
                )
            node.dirty.clear()
            node.seen = bytearray(node.durable)
            node.holder = None
        self.durable_names = dict(self.names)
        self.versions.update({*self.versions, *self.names})

    def release(self, process: Process) -> None:
        """The process has ended: its locks are free."""
        for node in self.names.values():
            if node.holder is process:
                node.holder = None


class View:
    """The disk as one process uses it; the implementation of ``vmferry.handoff.disk.Disk``."""

    def __init__(self, disk: HostDisk, process: Process, step: Step) -> None:
        self.disk = disk
        self.process = process
        self._step = step

    def step(self, kind: str, path: Path) -> None:
        """Come to a boundary: the process may be killed there, or the call fail."""
        self.process.check()
        error = self._step(kind, path.name)
        self.process.check()
        if error == "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if self.disk.full and kind in {"create", "allocate", "mkdir"}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def open(self, path: Path, *, writable: bool = False) -> File:
        """See ``Disk``."""
        self.process.check()
        if path not in self.disk.names:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
        return Opened(self, path, self.disk.names[path])

    def create(self, path: Path) -> File:
        """See ``Disk``."""
        self.step("create", path)
        node = self.disk.names[path] = Node()
        return Opened(self, path, node)

    def exists(self, path: Path) -> bool:
        """See ``Disk``."""
        self.process.check()
        return path in self.disk.names

    def glob(self, folder: Path, pattern: str) -> Iterable[Path]:
        """See ``Disk``."""
        self.process.check()
        wanted = pattern.removeprefix("*/")
        return [p for p in self.disk.names if p.parent.parent == folder and fnmatch.fnmatch(p.name, wanted)]

    def make_folder(self, path: Path) -> None:
        """See ``Disk``."""
        for folder in (*reversed(path.parents), path):
            if folder.parts[1:] and folder not in self.disk.names:
                self.step("mkdir", folder)
                self.disk.names[folder] = Node()

    def rename(self, old: Path, new: Path) -> None:
        """See ``Disk``."""
        self.step("rename", new)
        self.disk.names[new] = self.disk.names.pop(old)
        self.disk.changed(new)

    def link(self, old: Path, new: Path) -> None:
        """See ``Disk``."""
        self.step("link", new)
        if new in self.disk.names:
            raise FileExistsError(errno.EEXIST, "it exists", str(new))
        self.disk.names[new] = self.disk.names[old]

    def unlink(self, path: Path) -> None:
        """See ``Disk``."""
        self.step("unlink", path)
        if path not in self.disk.names:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
        del self.disk.names[path]

    def sync_folder(self, path: Path) -> None:
        """See ``Disk``."""
        self.step("syncdir", path)
        durable = self.disk.durable_names
        for name in [name for name in durable if name.parent == path and name not in self.disk.names]:
            del durable[name]
        durable.update({name: node for name, node in self.disk.names.items() if name.parent == path})

    def lock(self, path: Path, *, wait: bool) -> Lock:
        """See ``Disk``."""
        self.process.check()
        node = self.disk.names.setdefault(path, Node())
        if node.holder is not None:
            if wait:
                raise WouldBlockError(path)
            raise BlockingIOError(errno.EAGAIN, "another process has it", str(path))
        node.holder = self.process
        return Held(node, self.process)


class Held:
    """A lock that is held."""

    def __init__(self, node: Node, process: Process) -> None:
        self._node = node
        self._process = process

    def close(self) -> None:
        """Give it back."""
        if self._process.alive and self._node.holder is self._process:
            self._node.holder = None


class Opened:
    """An open file."""

    def __init__(self, view: View, path: Path, node: Node) -> None:
        self._view = view
        self._path = path
        self._node = node

    def read(self, offset: int = 0, length: int = -1) -> bytes:
        """See ``File``."""
        self._view.process.check()
        return bytes(self._node.seen[offset : None if length < 0 else offset + length])

    def write(self, data: bytes, offset: int) -> None:
        """See ``File``."""
        self._view.step("write", self._path)
        node = self._node
        if self._view.disk.full and offset + len(data) > max(len(node.seen), node.allocated):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        if len(node.seen) < offset:
            node.seen.extend(bytes(offset - len(node.seen)))
        node.seen[offset : offset + len(data)] = data
        node.dirty.append((offset, bytes(data)))
        self._view.disk.changed(self._path)

    def allocate(self, offset: int, length: int) -> None:
        """See ``File``."""
        self._view.step("allocate", self._path)
        self._node.allocated = max(self._node.allocated, offset + length)

    def sync_data(self) -> None:
        """See ``File``."""
        try:
            self._view.step("sync", self._path)
        except OSError:
            self._node.dirty.clear()  # the kernel calls the pages clean, and nobody will write them
            raise
        self._node.bring(self._node.dirty)
        self._node.dirty.clear()

    def sync(self) -> None:
        """See ``File``."""
        self.sync_data()

    def identity(self) -> str:
        """See ``File``."""
        return self._node.identity

    def close(self) -> None:
        """See ``File``."""
