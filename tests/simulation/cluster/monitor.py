"""What must hold in a simulated world, looked at after every step that could break it.

* I1: no machine runs twice. I1b: no two hosts are permitted to run one, and nobody resumes one on a record that is
  not on disk. I2: a guest goes on from its latest state only. I3: no step but a crash removes the last usable copy.
  I4: a crash loses nothing that another host holds, too.
* L1: some time after everything works again, each machine that was not lost runs somewhere, and nothing is left open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation.cluster.disk import HostDisk
from tests.simulation.cluster.guests import Guest
from vmferry.handoff import destination, source
from vmferry.handoff.ledger import HostLedger, Role, _View
from vmferry.handoff.rights import Rights
from vmferry.machines.port import RunState

MACHINE_FILES = ("operator.journal", "source.journal", "destination.journal")


class WatchedLedger(HostLedger):
    """A host's ledger that reads a journal again only after it was written to."""

    changed: Mapping[Path, int]

    def _view(self, machine_id: str, role: Role, *, settled: bool) -> _View:
        path = self._path(machine_id, role)
        version = self.changed.get(path, 0)
        known = self.__dict__.setdefault("views", {}).get(path)
        if known is None or known[0] != version:
            known = self.__dict__["views"][path] = (version, super()._view(machine_id, role, settled=settled))
        view: _View = known[1]
        return view


@dataclass
class Observed:
    """One host, as the monitor sees it."""

    disk: HostDisk
    guests: Mapping[str, Guest]
    ledger: WatchedLedger
    known: dict[str, Rights] = field(default_factory=dict)
    lost_guests: set[str] = field(default_factory=set)
    """Machines whose process died here with the host."""


class Monitor:
    """Looks at all hosts at once, as nobody in the world can."""

    def __init__(self) -> None:
        self.hosts: dict[str, Observed] = {}
        self.latest: dict[str, list[int]] = {}
        self.lost: set[str] = set()
        """Machines whose only copy died with its host."""
        self.violation = ""
        self.checks = 0

    def broken(self, what: str) -> None:
        """Note the first broken promise."""
        self.violation = self.violation or what

    def rights(self, host: str, machine: str) -> Rights:
        """What a host's journals say now."""
        observed = self.hosts[host]
        if machine not in observed.known:
            observed.known[machine] = observed.ledger.rights(machine)
        return observed.known[machine]

    def journal_changed(self, host: str, path: Path) -> None:
        """A journal was written to."""
        machine = path.parent.name
        if path.name in MACHINE_FILES and machine in self.latest:
            self.hosts[host].known.pop(machine, None)
            self.check(machine)

    def check(self, machine: str) -> None:
        """Look at everything about one machine."""
        self.checks += 1
        running = [name for name, host in self.hosts.items() if self._runs(host, machine)]
        if len(running) > 1:
            self.broken(f"I1: {machine} runs on {running}")
        permitted = [name for name in self.hosts if self.rights(name, machine).permitted]
        if len(permitted) > 1:
            self.broken(f"I1b: {permitted} are permitted to run {machine}")
        for name in self.hosts:
            if self.rights(name, machine).damaged:
                self.broken(f"damage: the journals of {name} about {machine}")
        if machine not in self.lost and not self.usable(machine):
            self.broken(f"I3: a step destroyed the last usable copy of {machine}")

    @staticmethod
    def _runs(host: Observed, machine: str) -> bool:
        guest = host.guests.get(machine)
        return guest is not None and guest.alive and guest.state is RunState.RUNNING

    def resumed(self, guest: Guest) -> None:
        """Virtual CPUs are about to start."""
        machine = guest.spec.uuid
        rights = self.rights(guest.host, machine)
        if not rights.permitted:
            self.broken(f"I1b: {guest.host} resumes {machine}: {rights.standing.name}")
        if guest.pages != self.latest[machine]:
            self.broken(f"I2: {guest.host} resumes {machine} from {guest.pages}, not {self.latest[machine]}")
        host = self.hosts[guest.host]
        for path, node in host.disk.names.items():
            on_disk = node.durable == node.seen and host.disk.durable_names.get(path) is node
            if path.parent.name == machine and path.name in MACHINE_FILES and not on_disk:
                self.broken(f"I1b: {guest.host} resumes {machine} on what is not on disk: {path.name}")

    def crashing(self, host: str, crash: Callable[[], None]) -> None:
        """A host crashes."""
        before = {machine: self.usable(machine) for machine in self.latest}
        guests = dict(self.hosts[host].guests)
        crash()
        self.hosts[host].known.clear()
        self.hosts[host].lost_guests |= {
            one for one, guest in guests.items() if guest.state is not RunState.INMIGRATE
        }
        for machine, copies in before.items():
            if machine in self.lost or self.usable(machine):
                continue
            self.lost.add(machine)
            if copies - {host}:
                self.broken(f"I4: the crash of {host} lost {machine}, which {sorted(copies)} held")

    def usable(self, machine: str) -> set[str]:
        """Hosts with a copy of the latest state that the protocol may still run."""
        rights = {name: self.rights(name, machine) for name in self.hosts}
        opened = [
            one.outgoing.attempt for one in rights.values() if not isinstance(one.outgoing, source.Quiet)
        ]
        found = set()
        for name, host in self.hosts.items():
            guest, mine = host.guests.get(machine), rights[name]
            if guest is None or not guest.alive or guest.pages != self.latest[machine]:
                continue
            arriving = mine.incoming.current
            deliverable = isinstance(arriving, (destination.Prepared, destination.Owned)) and any(
                arriving.attempt.matches(attempt) for attempt in opened
            )
            returnable = not isinstance(mine.outgoing, source.Quiet)
            if mine.permitted or returnable or deliverable:
                found.add(name)
        return found

    # Afterwards

    def unsettled(self, machine: str) -> str:
        """Why a machine has not come to rest; empty if it has."""
        rights = {name: self.rights(name, machine) for name in self.hosts}
        owners = [name for name, mine in rights.items() if mine.permitted]
        if self.awaits_a_person(machine):
            return ""
        if len(owners) != 1:
            return f"the owners are {owners}: " + ", ".join(
                f"{name} {mine.standing.name}" for name, mine in rights.items()
            )
        owner = owners[0]
        if machine not in self.hosts[owner].guests and machine in self.hosts[owner].lost_guests:
            return ""  # it died with its host
        if not self._runs(self.hosts[owner], machine):
            return f"it does not run on {owner}"
        for name, mine in rights.items():
            if name != owner and machine in self.hosts[name].guests:
                return f"a copy is left on {name}"
            if not isinstance(mine.outgoing, source.Quiet):
                return f"{name} has an attempt open"
        return ""

    def awaits_a_person(self, machine: str) -> bool:
        """A crash tore the last record behind PREPARED, or behind an open attempt, and took the copy with it.

        At the destination it may have been OWNED; at the source it may have been ABORTED, and what waits at the
        destination may be old.
        """
        return any(
            machine not in host.guests
            and machine in host.lost_guests
            and any(
                host.ledger._view(machine, role, settled=False).torn_tail
                for role in self._doubtful(name, machine)
            )
            for name, host in self.hosts.items()
        )

    def _doubtful(self, name: str, machine: str) -> Iterator[Role]:
        """Journals in whose torn end something decisive may have been."""
        rights = self.rights(name, machine)
        if isinstance(rights.incoming.current, destination.Prepared):
            yield Role.DESTINATION
        if isinstance(rights.outgoing, (source.Begun, source.Sealed)):
            yield Role.SOURCE

    def owner(self, machine: str) -> str:
        """Where a machine that has come to rest runs; empty if it was lost with its host."""
        return next((name for name, host in self.hosts.items() if self._runs(host, machine)), "")
