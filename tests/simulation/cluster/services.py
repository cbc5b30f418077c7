"""The real services of a host, on a simulated disk, network and hypervisor.

Real: ``SourceService``, ``DestinationService`` and all they are made of that decides or records (``Outgoing``,
``Recovered``, ``Departure``, ``Arrival``, the peer's messages, ledger, journals, register, gate). Replaced: what
touches memory (``Copy``, ``Receiver``), tickets, negotiation, and the transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from dest_svc.judging import Judge
from dest_svc.room import Room
from dest_svc.service import DestinationService
from source_svc.acceptance import Acceptance
from source_svc.forecasts import Forecast
from source_svc.means import Means
from source_svc.outgoing import Outgoing
from source_svc.peer import Destination
from source_svc.planning import Plan
from source_svc.recovery import Recovered
from source_svc.service import SourceService
from source_svc.underway import Underway
from tests.simulation.cluster.clock import Loop, Process
from tests.simulation.cluster.network import Network, identity_of
from tests.simulation.cluster.transfer import Copy, Frame, Receiver
from vmferry.config import HostConfig
from vmferry.errors import VmferryError
from vmferry.handoff.journal import SLOT_BYTES
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.states import Attempt
from vmferry.machines.directory import MachineRecord
from vmferry.machines.fileidentity import Contents
from vmferry.machines.host import MemoryBacking
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_from_message
from vmferry.memory.backings import TMPFS
from vmferry.negotiation.path import DIRECT
from vmferry.negotiation.report import PROTOCOL_VERSIONS, Report
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity
from vmferry.transfer.window import Budget
from vmferry.v1 import handoff_pb2
from vmferry.v1 import migration_pb2 as pb

JOURNALS: Final = Path("/host/journal")
EXTENT_SLOTS: Final = 12
"""Enough for an attempt, and little to read: worlds are made by the thousand."""
ADDRESS: Final = "host:7602"
CONFIG: Final = HostConfig(
    state_dir=Path("/host"),
    reserve_timeout_s=4.0,
    stall_timeout_s=3.0,
    reconnect_timeout_s=3.0,
    total_timeout_s=20.0,
    total_timeout_per_gib_s=20.0,
    switch_timeout_s=2.0,
    rpc_timeout_s=1.5,
    handoff_retry_s=1.0,
    receive_timeout_s=6.0,
    max_outgoing=16,
    max_incoming=16,
)
_FOREVER: Final = dt.datetime(2999, 1, 1, tzinfo=dt.UTC)
_TICKET_UNTIL: Final = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


class AmpleRoom(Room):
    """A host with more memory than anybody needs."""

    def backings(self) -> list[MemoryBacking]:
        """As much as is asked for."""
        return [MemoryBacking(TMPFS, 4096, 1 << 40)]


class SimulatedDestination(DestinationService):
    """A destination service that takes frames as calls and anybody's ticket."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._judge = LenientJudge(host.config)
        self._room = AmpleRoom(host.config, host.directory, self._arrivals, closed=lambda: False)

    async def Negotiate(self, request: Any, context: Any) -> handoff_pb2.NegotiateResponse:
        """Everything is compatible."""
        return handoff_pb2.NegotiateResponse(destination_incarnation=self._ledger.incarnation)

    async def OpenLane(self, request: tuple[bytes, bytes, int], context: object) -> tuple[int, int]:
        """Open a lane."""
        receiver: Any = self._receiver(request[0])
        opened: tuple[int, int] = receiver.open_lane(*request[1:])
        return opened

    async def SendFrame(self, frame: Frame, context: object) -> int:
        """Take in a frame."""
        receiver: Any = self._receiver(frame.migration_id)
        frames: int = receiver.take(frame)
        return frames

    async def EndLane(self, request: tuple[bytes, bytes, int, Any], context: object) -> None:
        """End a lane."""
        receiver: Any = self._receiver(request[0])
        receiver.end(*request[2:])


class SimulatedSource(SourceService):
    """A source service whose peers are reached over the simulated network."""

    def __init__(
        self, host: Host, network: Network, process: Process, unexpected: Callable[[str], None]
    ) -> None:
        with (
            mock.patch("source_svc.service.Means", return_value=SimulatedMeans(host, network, process)),
            mock.patch("source_svc.service.Underway", return_value=SimulatedUnderway(unexpected)),
        ):
            super().__init__(host)


class SimulatedMeans(Means):
    """Peers over the simulated network, and plans that find nothing."""

    def __init__(self, host: Host, network: Network, process: Process) -> None:
        super().__init__(host)
        self._network = network
        self._process = process

    def peer(self, address: str, host: Identity) -> Destination:
        """A destination over the simulated network."""
        return Peer(self._network, self._process, address, host)

    def plan(self, record: MachineRecord, host: Identity) -> Plan:
        """A plan to which nothing is incompatible."""
        until, own = _FOREVER.timestamp(), self._host.own.uri
        budget = Budget(self._host.config.shared_window_bytes)
        return AnyPlan(
            record.spec, self._host.ledger, (), own, host.uri, until, 1.0, 1.0, Contents(), budget=budget
        )


class SimulatedUnderway(Underway):
    """Says when a migration ends in what it never should."""

    def __init__(self, unexpected: Callable[[str], None]) -> None:
        super().__init__()
        self._unexpected = unexpected

    def _forget(self, one: Outgoing | Recovered, task: asyncio.Task[None]) -> None:
        super()._forget(one, task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception) and not isinstance(error, VmferryError):
            self._unexpected(f"a migration ended in {error!r}")


class AnyTicket(Acceptance):
    """Anybody's ticket is good, and is the migration's identity."""

    def check_ticket(self, data: bytes, record: MachineRecord, destination: Identity, *, caller: str) -> Any:
        """Nothing is checked."""
        return SimpleNamespace(migration_id=data, start_by=_TICKET_UNTIL)


class NoStore:
    """A source service that remembers nothing: what it decides must not need its memory."""

    def __init__(self, path: Path, schemas: object) -> None:
        """There is no file."""

    async def open(self) -> None:
        """There is no thread."""

    async def tell(self, work: object) -> bool:
        """Nothing is on disk."""
        return False

    async def ask(self, work: object, otherwise: Any) -> Any:
        """Nothing is found."""
        return otherwise

    async def close(self) -> None:
        """Nothing is held."""


class Peer(Destination):
    """A destination over the simulated network; the messages are the real ones."""

    def __init__(self, network: Network, process: Process, address: str, expected: Identity) -> None:
        self.address = address
        self.expected = expected
        self._timeout_s = CONFIG.rpc_timeout_s
        self._stub: Any = Stub(network, process, expected.name)

    async def close(self) -> None:
        """Nothing is held."""

    def _connect_anew(self) -> None:
        """There is no certificate that could be a newer one."""


class Stub:
    """What gRPC generates, for the simulated network."""

    def __init__(self, network: Network, process: Process, callee: str) -> None:
        self._network = network
        self._process = process
        self._callee = callee

    def __getattr__(self, method: str) -> Any:
        def call(request: Any, timeout: float) -> Any:
            return self._network.call(self._process, self._callee, method, request, timeout)

        return call


class AnyPlan(Plan):
    """A plan to which nothing is incompatible."""

    async def report(self, machine: Any, destination: Destination, tracker: str, **wishes: Any) -> Report:
        """Ask the destination who it is."""
        answer = await destination.negotiate(self.spec, (), (), timeout_s=CONFIG.rpc_timeout_s)
        self.destination_incarnation = answer.destination_incarnation
        return Report((), PROTOCOL_VERSIONS[0], tracker, DIRECT)


class LenientJudge(Judge):
    """Judges nothing."""

    async def against(self, *what: Any, **how: Any) -> list[Any]:
        """There is nothing to be said against any machine."""
        return []


def any_begin(request: handoff_pb2.BeginRequest, attempt: Attempt, host: Host) -> tuple[MachineSpec, Any]:
    """Anybody's ticket is good."""
    return spec_from_message(request.spec), SimpleNamespace(
        nonce=attempt.migration_id, start_by=_TICKET_UNTIL
    )


class NoForecasts:
    """Predicts nothing."""

    def __init__(self, trackers: object) -> None:
        """Nothing is measured."""

    def planned(self, subject: object) -> Forecast:
        """There is no plan."""
        return Forecast()

    @contextlib.asynccontextmanager
    async def meanwhile(self, *what: object) -> AsyncIterator[None]:
        """Nothing is measured."""
        yield

    def judge(self, *what: object) -> None:
        """Nothing is learnt."""


class NoMetadata:
    """No guest asks what it is to expect."""

    announcements = None

    def __init__(self, *what: object, **how: object) -> None:
        """Nobody is served."""

    async def start(self) -> None:
        """Nobody is served."""

    async def close(self) -> None:
        """Nobody was served."""


class NoNotice:
    """The guest is told nothing."""

    def __init__(self, *what: object) -> None:
        """There is nothing to tell."""

    async def give(self) -> None:
        """It does not have to approve."""

    def started(self) -> None:
        """It is not told."""

    def hand_on(self) -> bytes:
        """Nothing of it travels."""
        return b""

    def resumed(self) -> None:
        """It is not told."""

    def close(self, *, unsettled: bool) -> None:
        """Nothing is held."""


@contextlib.asynccontextmanager
async def no_files(*what: Any, **how: Any) -> AsyncIterator[Any]:
    """Machines have no files."""
    yield SimpleNamespace(check=lambda: None, identities=())


def make_host(name: str, ledger: HostLedger, directory: Any, journal_broken: Any) -> Host:
    """What a service of a host stands on."""
    own = identity_of(name)
    material = SimpleNamespace(identity=own, not_after=_FOREVER)
    files: Any = SimpleNamespace(load=lambda: material, fingerprint=tuple)
    return Host(CONFIG, files, own, ledger, directory, (), journal_broken)


def start_request(machine: str, destination: str, migration_id: bytes) -> pb.StartMigrationRequest:
    """What a scheduler asks a source."""
    target = pb.Destination(host=identity_of(destination).uri, address=ADDRESS)
    request_id = f"00000000-0000-4000-8000-{migration_id[-6:].hex()}"
    return pb.StartMigrationRequest(
        machine=machine, destination=target, ticket=migration_id, request_id=request_id
    )


class Clock:
    """The module ``time`` of a simulated world."""

    def __init__(self, loop: Loop) -> None:
        self.monotonic = loop.time

    def sleep(self, seconds: float) -> None:
        """Nothing else happens meanwhile."""

    def time(self) -> float:
        """The wall clock is the same one."""
        return self.monotonic()

    def time_ns(self) -> int:
        """The same."""
        return int(self.monotonic() * 1e9)


async def no_clock(*_: object, **__: object) -> int:
    """Simulated guests have no clock; nothing is decided by one."""
    return 0


CLOCKS: Final = (
    "source_svc.outgoing.ask_arrived",
    "source_svc.outgoing.see_to_returned",
    "source_svc.recovery.ask_arrived",
    "source_svc.recovery.see_to_returned",
    "source_svc.recovery.see_to",
    "source_svc.switching.told_ns",
    "dest_svc.arrival.put_right",
)
"""Where a guest's clock is looked after."""


@contextlib.contextmanager
def replaced(loop: Loop, extent_slots: int = EXTENT_SLOTS) -> Iterator[None]:
    """With everything in place that the services find by name."""
    clock = Clock(loop)
    parts = {
        "source_svc.outgoing.Copy": Copy,
        "source_svc.service.Forecasts": NoForecasts,
        "source_svc.outgoing.Notice": NoNotice,
        "source_svc.outgoing.shown": no_files,
        "source_svc.service.MetadataService": NoMetadata,
        "dest_svc.service.check_begin": any_begin,
        "source_svc.departure.time": clock,
        "source_svc.outgoing.time": clock,
        "source_svc.migrations.time": clock,
        "source_svc.underway.gc": SimpleNamespace(collect=lambda: None),
        "source_svc.service.Store": NoStore,
        "source_svc.service.current_caller": lambda: identity_of("scheduler"),
        "source_svc.service.Acceptance": AnyTicket,
        "source_svc.dispatcher.time": clock,
        "source_svc.history.time": clock,
        "dest_svc.service.Receiver": Receiver,
        **dict.fromkeys(CLOCKS, no_clock),
        "dest_svc.service.time": clock,
        "dest_svc.watching.time": clock,
        "vmferry.handoff.ledger.time": clock,
        "vmferry.handoff.journal.SLOTS_PER_EXTENT": extent_slots,
        "vmferry.handoff.journal._EXTENT_BYTES": extent_slots * SLOT_BYTES,
    }
    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(mock.patch(name, part))
        yield
