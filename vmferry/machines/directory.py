"""The machines of this host, as they lie on disk: one folder each, and the memory files beside.

Promise: the folder tells everything; no service has to have started a machine to find it again after a
restart. A machine is called alive only if its very process is (never by process number alone). A damaged or
foreign entry never hides the others: it is left out and named in ``problems``.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.errors import (
    ConfigError,
    MachineBusyError,
    MachineDeadError,
    MachineExistsError,
    MachineNotFoundError,
    VmferryError,
)
from vmferry.machines.paths import MachinePaths, write_whole
from vmferry.machines.process import ProcessIdentity
from vmferry.machines.qmp import DEFAULT_QMP_TIMEOUT_S, QmpMachine
from vmferry.machines.spec import MachineSpec
from vmferry.memory.backings import HUGETLBFS
from vmferry.memory.hugepages import check_folder

__all__ = ["DirectoryProblem", "MachineDirectory", "MachinePaths", "MachineRecord"]


@dataclass(frozen=True)
class MachineRecord:
    """One machine as it was found on disk."""

    spec: MachineSpec
    paths: MachinePaths
    process: ProcessIdentity | None
    """The process that was started for it; ``None`` if none was recorded."""
    alive: bool
    """Whether that process still ran when the record was made."""

    @property
    def pid(self) -> int | None:
        """The number of the machine's process; ``None`` if it does not run."""
        return self.process.pid if self.process is not None and self.alive else None


@dataclass(frozen=True)
class DirectoryProblem:
    """An entry that is no machine, or one that cannot be understood."""

    path: Path
    reason: str


class MachineDirectory:
    """The machines below one folder.

    Attributes:
        problems: what the latest ``list`` or ``find`` could not make sense of.
    """

    def __init__(
        self,
        root: Path,
        ram_root: Path,
        huge_root: Path | None = None,
        *,
        qmp_timeout_s: float = DEFAULT_QMP_TIMEOUT_S,
    ) -> None:
        # A machine's process has another working directory, so its paths must not depend on ours.
        self.root = root.absolute()
        self.ram_root = ram_root.absolute()
        self.huge_root = huge_root.absolute() if huge_root is not None else None
        self.problems: Sequence[DirectoryProblem] = ()
        self.qmp_timeout_s = qmp_timeout_s

    def paths(self, spec: MachineSpec) -> MachinePaths:
        """Where the files of a machine lie, or would lie.

        Raises:
            ConfigError: the paths would be too long for its sockets, or this host has no place for its memory.
        """
        ram_root = self.ram_root
        if spec.memory_backing == HUGETLBFS:
            if self.huge_root is None:
                raise ConfigError(
                    f"this host has no place for memory in huge pages, which {spec.name} needs",
                    field="huge_dir",
                    remedy="Mount a hugetlbfs and name it as huge_dir in the configuration.",
                )
            ram_root = self.huge_root
        return MachinePaths.of(self.root, ram_root, name=spec.name, uuid=spec.uuid)

    def find(self, name_or_uuid: str) -> MachineRecord:
        """The machine with this name or identity.

        Raises:
            MachineNotFoundError: there is none, or its entry is damaged (the message says which).
        """
        for record in self.list():
            if name_or_uuid in (record.spec.name, record.spec.uuid):
                return record
        damaged = [problem.reason for problem in self.problems if problem.path.name == name_or_uuid]
        why = f": its entry in {self.root} is damaged: {damaged[0]}" if damaged else ""
        raise MachineNotFoundError(f"no machine {name_or_uuid!r} on this host{why}", machine=name_or_uuid)

    def open(self, record: MachineRecord, *, observe: bool = False) -> QmpMachine:
        """Take hold of a running machine; nothing is connected yet.

        Args:
            record: the machine.
            observe: only to ask it something, beside whoever drives it.

        Raises:
            MachineDeadError: its process does not run.
        """
        if record.process is None or not record.process.alive():
            raise MachineDeadError(
                f"machine {record.spec.name} has no running process", machine=record.spec.uuid
            )
        return QmpMachine(
            record.spec, record.paths, record.process, qmp_timeout_s=self.qmp_timeout_s, observe=observe
        )

    def forget(self, record: MachineRecord, *, remove_ram: bool) -> None:
        """Remove what is left of a machine whose process has ended.

        Raises:
            MachineBusyError: its process runs.
        """
        if record.process is not None and record.process.alive():
            raise MachineBusyError(
                f"machine {record.spec.name} still runs as process {record.process.pid}",
                remedy="Stop the machine first.",
                machine=record.spec.uuid,
            )
        # Memory first: a folder without memory can be forgotten again, memory without a folder never is.
        if remove_ram:
            _remove_memory(record.paths.ram)
        if record.paths.home.exists():
            shutil.rmtree(record.paths.home)

    def claim(self, spec: MachineSpec) -> MachinePaths:
        """Make the folder of a new machine and put its description there.

        Raises:
            MachineExistsError: the name or the identity is taken.
            ConfigError: the paths would be too long for its sockets, or this host has no place for its memory.
        """
        paths = self.paths(spec)
        if spec.memory_backing == HUGETLBFS:
            check_folder(paths.ram.parent)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths.ram.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for record in self.list():
            if record.spec.uuid == spec.uuid:
                raise _taken(f"identity {spec.uuid}", record.spec.name, spec)
        try:
            # Two that come at once with one name are told apart here, by the file system.
            paths.home.mkdir(mode=0o700)
        except FileExistsError as error:
            raise _taken(f"name {spec.name!r}", spec.name, spec) from error
        try:
            write_whole(paths.spec, spec.to_toml())
        except BaseException:
            shutil.rmtree(paths.home)
            raise
        return paths

    def list(self) -> list[MachineRecord]:
        """All machines that can be understood, by name; the others are named in ``problems``."""
        records: dict[str, MachineRecord] = {}
        problems: list[DirectoryProblem] = []
        for home in self._entries():
            try:
                record = self._read(home)
            except (VmferryError, OSError, ValueError) as error:
                problems.append(DirectoryProblem(home, str(error)))
                continue
            first = records.setdefault(record.spec.uuid, record)
            if first is not record:
                reason = f"the identity {record.spec.uuid} is also that of machine {first.spec.name}"
                problems.append(DirectoryProblem(home, reason))
        self.problems = tuple(problems)
        return list(records.values())

    def _entries(self) -> Iterator[Path]:
        if self.root.exists():
            yield from sorted(self.root.iterdir())

    def _read(self, home: Path) -> MachineRecord:
        if home.is_symlink() or not home.is_dir():
            raise ValueError("not a folder")
        spec = MachineSpec.load(home / "spec.toml")
        if spec.name != home.name:
            raise ValueError(f"the folder of {home.name} describes a machine named {spec.name}")
        paths = self.paths(spec)
        process = None
        if paths.process.exists():
            try:
                process = ProcessIdentity.from_json(paths.process.read_text(encoding="utf-8"))
            except ValueError as error:
                # Whether it runs cannot be told, so it must not be taken for one that does not.
                raise ValueError(f"{paths.process.name} is damaged: {error}") from error
        return MachineRecord(spec, paths, process, alive=process is not None and process.alive())


def _taken(what: str, holder: str, spec: MachineSpec) -> MachineExistsError:
    return MachineExistsError(f"the {what} belongs to machine {holder} on this host", machine=spec.uuid)


def _remove_memory(path: Path) -> None:
    """Remove a memory file; the name goes at once, giving the memory back takes as long as it is large."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    path.unlink(missing_ok=True)
    # A file without a name is there until it is closed. An event loop would stand still for that long.
    threading.Thread(target=os.close, args=(fd,), name="memory given back").start()
