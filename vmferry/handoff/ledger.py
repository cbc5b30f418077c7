"""All journals of one host: what they say together, and who may write which.

Layout below the journal directory::

  register                        which journals there are, how far each was on disk, and the directory's incarnation:
                                  a UUID made with it. A host that lost its journals is another one, and each journal
                                  names it, so that one from another host is not believed
  source.lock, destination.lock   held for life by the one service of that role
  MACHINE-UUID/operator.journal   BORN and ENDED, written by ``vmferry machine run|stop``
  MACHINE-UUID/source.journal     written by the source service
  MACHINE-UUID/destination.journal  written by the destination service
  MACHINE-UUID/update.journal     written by the source service, about updates in place
  MACHINE-UUID/lock               held for a moment while a journal is checked and then appended to

Promise: :meth:`HostLedger.rights` reads what is in the files, whoever wrote it; a journal that is missing, or is not
the one that was on disk before, permits nothing (``register``). A machine is born, ended, begun or
accepted under the machine's lock after that view was checked, so two processes cannot both find it free.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Generic, TypeVar

from vmferry.errors import (
    InvalidArgumentError,
    JournalDamagedError,
    MachineBusyError,
    MachineExistsError,
    MachineNotOwnedError,
)
from vmferry.handoff import destination, gate, journal, records, source, updating
from vmferry.handoff.disk import DISK, Disk, damaging
from vmferry.handoff.gate import ResumePermit
from vmferry.handoff.register import Mark, Register, earlier_incarnation
from vmferry.handoff.rights import Epochs, Rights
from vmferry.handoff.rolelock import RoleLock
from vmferry.handoff.states import Append, Attempt, InvalidTransitionError, Record, RecordKind
from vmferry.together import to_the_end

FIRST_EPOCH = 1


class Role(enum.StrEnum):
    """Who writes a journal."""

    OPERATOR = "operator"
    SOURCE = "source"
    DESTINATION = "destination"
    UPDATE = "update"


@dataclass(frozen=True)
class _View:
    """One journal, folded."""

    records: tuple[Record, ...] = ()
    torn_tail: bool = False
    damage: str = ""

    @property
    def epochs(self) -> Epochs:
        epochs = Epochs()
        for record in self.records:
            epochs = epochs.after(record)
        return epochs


@dataclass(frozen=True)
class Health:
    """How far a journal can be believed."""

    torn_tail: bool = False
    damage: str = ""


class HostLedger:
    """The journals of this host."""

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        self.directory = directory
        self._disk = disk
        self._distrusted: dict[Path, str] = {}
        """Journals that this process could not sync: a sync that works later does not bring back what was lost."""
        _make_folders(directory, disk)
        self._register = Register(directory, disk)
        self.incarnation = self._register.incarnation
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._take_over()

    def _take_over(self) -> None:
        """Enter the journals of the release before, which had no register, as they are; begun again if it was cut."""
        if earlier_incarnation(self.directory, self._disk) != self.incarnation:
            return
        for machine_id, role in itertools.product(self.machines(), Role):
            path, label = self._file(machine_id, role)
            found = journal.read(path, label, settled=True, disk=self._disk)
            if found.hashes and not found.damage:
                self._register.add(_entry(machine_id, role), Mark(len(found.hashes), found.hashes[-1]))
        with contextlib.suppress(FileNotFoundError):  # the other service may have been faster
            self._disk.unlink(self.directory / "incarnation")
        self._disk.sync_folder(self.directory)

    def machines(self, role: Role | None = None) -> list[str]:
        """Identities of all machines that any journal here speaks of, or that of one role."""
        found = {path.parent.name for path in self._disk.glob(self.directory, f"*/{role or '*'}.journal")}
        # A journal that is missing is to be met, too, by whoever looks after all of them.
        written = (name.split("/") for name in self._register.names())
        found |= {machine for machine, writer in written if role in (None, writer)}
        return sorted(name for name in found if _is_uuid(name))

    def rights(self, machine_id: str, *, settled: bool = False) -> Rights:
        """What the journals say about one machine; with ``settled`` all of it is on disk on return."""
        views = {role: self._view(machine_id, role, settled=settled) for role in Role}
        epochs = reduce(Epochs.merged, (view.epochs for view in views.values()))
        outgoing: source.SourceState = source.Quiet()
        incoming = destination.DestinationState()
        update: updating.UpdateState = updating.Still()
        damaged = bool(views[Role.OPERATOR].damage)
        try:
            outgoing = _folded(views[Role.SOURCE], outgoing, source.evolve)
            incoming = _folded(views[Role.DESTINATION], incoming, destination.evolve)
            update = _folded(views[Role.UPDATE], update, updating.evolve)
        except InvalidTransitionError:
            damaged = True
        return Rights(epochs, outgoing, incoming, damaged=damaged, update=update)

    def health(self, machine_id: str) -> dict[Role, Health]:
        """How far each journal of a machine can be believed, for people to read."""
        return {role: self._health(role, self._view(machine_id, role, settled=False)) for role in Role}

    def _health(self, role: Role, view: _View) -> Health:
        damage = view.damage
        try:
            if role is Role.SOURCE:
                _folded(view, source.Quiet(), source.evolve)
            elif role is Role.DESTINATION:
                _folded(view, destination.DestinationState(), destination.evolve)
            elif role is Role.UPDATE:
                _folded(view, updating.Still(), updating.evolve)
        except InvalidTransitionError as error:
            damage = str(error)
        return Health(view.torn_tail, damage)

    def forced(self, machine_id: str, role: Role) -> tuple[Record, ...]:
        """What operators decided about a machine in one role, oldest first."""
        found = self._view(machine_id, role, settled=False).records
        return tuple(record for record in found if record.kind is RecordKind.FORCED)

    def goodbyes(self, machine_id: str) -> tuple[Attempt, ...]:
        """Attempts that this host closed as their source, and whose destinations may not have heard, oldest first.

        Those of a right that was given up long ago are left out, but for what an operator decided.
        """
        granted = self.rights(machine_id).epochs.granted
        closing = {RecordKind.ABORTED, RecordKind.RECLAIMED}
        return tuple(
            record.attempt
            for record in self._view(machine_id, Role.SOURCE, settled=False).records
            if record.attempt is not None
            and (
                record.kind is RecordKind.FORCED
                or (record.kind in closing and record.attempt.epoch_from + 2 >= granted)
            )
        )

    def permit(self, machine_id: str) -> ResumePermit:
        """A permit to resume the machine, if the journals on disk allow it."""
        return gate.mint(machine_id, self.rights(machine_id, settled=True))

    def birth(self, machine_id: str) -> ResumePermit:
        """Record that the machine was made here, and allow it to run.

        Raises:
            MachineExistsError: a journal already speaks of it; only a machine nobody has seen can be born.
        """
        with self.machine_lock(machine_id):
            path = self._path(machine_id, Role.OPERATOR)
            if not self.rights(machine_id).unheard_of or self._disk.exists(path):
                raise MachineExistsError(f"machine {machine_id} is known to this host's journal already")
            self._operator_record(Record(RecordKind.BORN, machine_id, epoch=FIRST_EPOCH))
        return self.permit(machine_id)

    def end(self, machine_id: str) -> None:
        """Record that an operator ended the machine, or a copy that is superseded; nobody may resume it any more.

        Raises:
            MachineBusyError: a migration has an attempt open that takes it away, or it is being updated.
            MachineNotOwnedError: it is not this host's to end.
        """
        with self.machine_lock(machine_id):
            rights = self.rights(machine_id, settled=True)
            if rights.damaged:
                raise JournalDamagedError(
                    f"the journal of machine {machine_id} is damaged", machine=machine_id
                )
            if rights.leaving or rights.being_updated:
                what = "migrated away" if rights.leaving else "updated in place"
                raise MachineBusyError(f"machine {machine_id} is being {what}", machine=machine_id)
            if not rights.owner and not rights.superseded:
                raise MachineNotOwnedError(
                    f"machine {machine_id} does not belong to this host", machine=machine_id
                )
            self._operator_record(Record(RecordKind.ENDED, machine_id, epoch=rights.epochs.granted))

    @contextlib.contextmanager
    def machine_lock(self, machine_id: str) -> Iterator[None]:
        """Keeps every other process from changing what the journals say about the machine."""
        path = self._made_folder(machine_id) / "lock"
        with damaging("lock", path):
            lock = self._disk.lock(path, wait=True)
        with contextlib.closing(lock):
            yield

    @contextlib.asynccontextmanager
    async def locked(self, machine_id: str) -> AsyncIterator[None]:
        """:meth:`machine_lock` for coroutines: waiting for another process stops nobody else."""
        with contextlib.ExitStack() as stack:
            # To its end: a lock that is taken after its taker was cancelled would never be given back.
            await to_the_end(asyncio.to_thread(stack.enter_context, self.machine_lock(machine_id)))
            yield

    def permitted(self, machine_id: str) -> AbstractAsyncContextManager[ResumePermit]:
        """A permit that cannot go stale while it is used: until then nobody can begin to send the machine away."""
        return self._minted(machine_id, lambda: self.permit(machine_id))

    def held_back(self, machine_id: str) -> AbstractAsyncContextManager[ResumePermit]:
        """A permit to let a guest go on that is held for a moment while its machine is copied."""
        # An attempt was on disk before anything was copied; a later record refuses even before it is.
        return self._minted(machine_id, lambda: gate.mint_held_back(machine_id, self.rights(machine_id)))

    def for_update(self, machine_id: str) -> AbstractAsyncContextManager[ResumePermit]:
        """A permit to let the guest run in the new process of an update in place."""
        # The switch was on disk before RAN was written, which no crash has to leave there.
        return self._minted(machine_id, lambda: gate.mint_for_update(machine_id, self.rights(machine_id)))

    @contextlib.asynccontextmanager
    async def _minted(self, machine_id: str, mint: Callable[[], ResumePermit]) -> AsyncIterator[ResumePermit]:
        stack = contextlib.ExitStack()

        def lock_and_mint() -> ResumePermit:
            stack.enter_context(self.machine_lock(machine_id))
            return mint()

        with stack:
            # One hop to a thread, since a guest's pause waits for it.
            yield await to_the_end(asyncio.to_thread(lock_and_mint))

    def lock_role(self, role: Role) -> RoleLock:
        """Become the one writer of a role's journals until the process ends.

        Raises:
            ConfigError: another process has that role on this directory.
        """
        return RoleLock(self.directory / f"{role}.lock", role, self._disk)

    def open_source(self, machine_id: str) -> MachineJournal[source.SourceState]:
        """The machine's source journal, for appending; the caller holds the role's lock."""
        return MachineJournal(self, machine_id, Role.SOURCE, source.Quiet(), source.evolve)

    def open_destination(self, machine_id: str) -> MachineJournal[destination.DestinationState]:
        """The machine's destination journal, for appending; the caller holds the role's lock."""
        initial = destination.DestinationState()
        return MachineJournal(self, machine_id, Role.DESTINATION, initial, destination.evolve)

    def open_update(self, machine_id: str) -> MachineJournal[updating.UpdateState]:
        """The machine's journal of updates, for appending; the caller holds the lock of the source's role."""
        return MachineJournal(self, machine_id, Role.UPDATE, updating.Still(), updating.evolve)

    def _operator_record(self, record: Record) -> None:
        with contextlib.closing(self._opened(record.machine_id, Role.OPERATOR)) as log:
            log.append(self._encode(record), durable=True)
            self._note(record.machine_id, Role.OPERATOR, log)

    def _encode(self, record: Record) -> bytes:
        return records.encode(record, boot_id=self.boot_id, write_unix_ns=time.time_ns())

    def _opened(self, machine_id: str, role: Role) -> journal.Journal:
        """A journal for appending, with its entry in the register; the first record follows that."""
        path, label = self._file(machine_id, role)
        mark = self._register.mark(_entry(machine_id, role))
        if mark is not None and not self._disk.exists(path):
            raise JournalDamagedError(f"{path} is missing", path=path)
        log = journal.Journal(path, label, self._disk)
        with contextlib.ExitStack() as closing:
            closing.callback(log.close)
            if problem := _contradiction(mark, log.contents):
                raise JournalDamagedError(f"{path}: {problem}", path=path)
            if mark is None:
                self._register.add(_entry(machine_id, role), Mark(*log.end))
            else:
                self._register.note(_entry(machine_id, role), Mark(*log.end), settled=True)
            closing.pop_all()
        return log

    def _note(self, machine_id: str, role: Role, log: journal.Journal) -> None:
        """Keep in mind that all of a journal is on disk."""
        self._register.note(_entry(machine_id, role), Mark(*log.end))

    def _view(self, machine_id: str, role: Role, *, settled: bool) -> _View:
        view = self._read(machine_id, role, settled=settled)
        for _ in range(3):
            if not (view.torn_tail or view.damage):
                break
            time.sleep(0.001)  # its writer may be in the middle of an append
            view = self._read(machine_id, role, settled=settled)
        return view

    def _read(self, machine_id: str, role: Role, *, settled: bool) -> _View:
        path, label = self._file(machine_id, role)
        if path in self._distrusted:
            return _View(damage=self._distrusted[path])
        try:
            # The mark first: a journal that grows meanwhile is ahead of it, as it may be.
            mark = self._register.mark(_entry(machine_id, role))
        except JournalDamagedError as error:
            return _View(damage=error.message)
        known = 0 if mark is None else mark.slots
        contents = journal.read(path, label, settled=settled, known=known, disk=self._disk)
        if contents.sync_failed:
            self._distrusted[path] = contents.damage
        if problem := contents.damage or _contradiction(mark, contents):
            return _View(damage=problem)
        return _decoded(contents)

    def _folder(self, machine_id: str) -> Path:
        if not _is_uuid(machine_id):
            raise InvalidArgumentError("a machine's identity is a lower-case UUID", field="machine_id")
        return self.directory / machine_id

    def _made_folder(self, machine_id: str) -> Path:
        folder = self._folder(machine_id)
        with damaging("make", folder):
            self._disk.make_folder(folder)
        return folder

    def _path(self, machine_id: str, role: Role) -> Path:
        return self._folder(machine_id) / f"{role}.journal"

    def _file(self, machine_id: str, role: Role) -> tuple[Path, bytes]:
        return self._path(machine_id, role), f"vmferry {role} {machine_id} {self.incarnation}".encode()


def _make_folders(directory: Path, disk: Disk) -> None:
    """Make the journal directory; the folders that it is the first to need survive a crash, too."""
    with damaging("make", directory):
        new = [folder for folder in (directory, *directory.parents) if not disk.exists(folder)]
        disk.make_folder(directory)
        for folder in new:
            disk.sync_folder(folder.parent)


def _entry(machine_id: str, role: Role) -> str:
    return f"{machine_id}/{role}"


def _contradiction(mark: Mark | None, contents: journal.Contents) -> str:
    """Why the register says that a journal is not what it was; empty if it may be."""
    if mark is None:
        return "it has records and is not in the register" if contents.payloads else ""
    return mark.contradiction(contents.hashes)


def _decoded(contents: journal.Contents) -> _View:
    try:
        decoded = [records.decode(payload) for payload in contents.payloads]
    except ValueError as error:
        return _View(damage=f"a record cannot be read: {error}")
    found = tuple(record for record, _ in decoded)
    return _View(found, contents.torn_tail)


State = TypeVar("State", source.SourceState, destination.DestinationState, updating.UpdateState)
Evolve = Callable[[State, Record], State]


def _folded(view: _View, initial: State, evolve: Evolve[State]) -> State:
    if view.damage:
        raise InvalidTransitionError(view.damage)
    return reduce(evolve, view.records, initial)


class MachineJournal(Generic[State]):
    """One machine's journal in one role, with the state it folds to; states change here and nowhere else."""

    def __init__(
        self, ledger: HostLedger, machine_id: str, role: Role, initial: State, evolve: Evolve[State]
    ) -> None:
        self._ledger = ledger
        self._evolve: Evolve[State] = evolve
        self._role = role
        self.machine_id = machine_id
        ledger._made_folder(machine_id)  # noqa: SLF001 - one unit with the ledger
        self._journal = ledger._opened(machine_id, role)  # noqa: SLF001 - one unit with the ledger
        view = _decoded(self._journal.contents)
        self.torn_tail = view.torn_tail
        try:
            self.state: State = _folded(view, initial, evolve)
        except InvalidTransitionError as error:
            self._journal.close()
            path = self._journal.path
            raise JournalDamagedError(f"{path}: {error}", path=path) from error

    def append(self, action: Append) -> None:
        """Write one record and fold it in; durable ones are on disk on return."""
        # What cannot follow is refused before anything is written.
        state = self._evolve(self.state, action.record)
        self._journal.append(self._ledger._encode(action.record), durable=action.durable)  # noqa: SLF001 - one unit
        self.state = state
        if action.durable:
            try:
                self._ledger._note(self.machine_id, self._role, self._journal)  # noqa: SLF001 - one unit
            except JournalDamagedError as error:
                self._journal.give_up(error.message)
                raise
        self.torn_tail = False

    def sync(self) -> None:
        """Bring a lazy record to disk beside other work, so that the next record need not wait for it."""
        self._journal.sync()

    def probe(self) -> None:
        """Check that further records could be written."""
        self._journal.probe()

    def close(self) -> None:
        """Give the file back; safe to call twice."""
        self._journal.close()


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
