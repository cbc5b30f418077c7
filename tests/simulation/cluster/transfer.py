"""Memory on its way between two simulated hosts: the real numbering of frames, over lanes that break.

Only what reads and writes memory is simulated. A frame holds one page; a lane is a sequence of calls, reopened after
one that was not answered, and an older connection's frames may still arrive.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from tests.simulation.cluster.guests import PAGES, Directory, Machine, memory_root
from vmferry.errors import (
    HashMismatchError,
    MachineDeadError,
    PeerUnreachableError,
    PermissionDeniedError,
    StaleAttemptError,
    StreamBrokenError,
    TimedOutError,
)
from vmferry.handoff.states import Attempt
from vmferry.machines.launcher import stop_machine
from vmferry.machines.spec import MachineSpec
from vmferry.together import together
from vmferry.transfer.numbering import Arrival, ReceivingLane, SendingLane, Totals
from vmferry.transfer.patience import Connections
from vmferry.transfer.seal import seal_digest

LANES: Final = 2
_FRAME_S: Final = 1.0
_LANES_END_S: Final = 2.0
_BACKOFF_S: Final = 0.3
_WINDOW: Final = 2
DEVICES: Final = -1


class Frame(NamedTuple):
    """What goes over a lane: a page and its content, or the device state."""

    migration_id: bytes
    token: bytes
    lane: int
    connection: int
    sequence: int
    page: int
    content: Any


class Copy:
    """The source's side; takes the place of ``source_svc.copying.Copy``."""

    tracker_kind = "simulated"

    def __init__(self, machine: Machine, destination: Any, migration: Any, settings: Any) -> None:
        self.round_number = 0
        self.last_round_bytes = 0
        self.last_round_s = 0.0
        self._machine = machine
        self._stub = destination._stub
        self._stall_s = settings.stall_timeout_s
        self._lanes: list[_SendingEnd] = []
        self._device_state = b""
        self.connections = Connections(LANES, whole=True, all_lost_s=None, reconnect_left_s=0.0, broken_s=0.0)

    async def open(self, migration_id: bytes, transfer_token: bytes) -> None:
        """Connect the lanes."""
        self._machine.guest.dirty = set(range(PAGES))
        self._lanes = [
            _SendingEnd(self._stub, migration_id, transfer_token, number, self._stall_s)
            for number in range(LANES)
        ]

    async def converge(self, may_switch: Callable[[], Awaitable[bool]]) -> None:
        """Copy what the guest writes, until the destination is ready."""
        while True:
            await self._round()
            self._machine._world.guest_writes(self._machine.guest)
            if await may_switch():
                return
            await asyncio.sleep(0.05)

    async def _round(self) -> None:
        self.round_number += 1
        dirty, self._machine.guest.dirty = sorted(self._machine.guest.dirty), set()
        frames = [(page, self._machine.guest.pages[page]) for page in dirty]
        await self._send(frames)

    async def _send(self, frames: list[tuple[int, Any]]) -> None:
        await together(
            *(
                lane.carry(frames[number::LANES])
                for number, lane in enumerate(self._lanes)
                if frames[number::LANES]
            )
        )

    async def pause(self) -> float:
        """Pause the guest."""
        await self._machine.stop()
        return asyncio.get_running_loop().time()

    async def last_round(self) -> None:
        """Send what was written until the pause."""
        await self._round()

    async def leftovers(self) -> None:
        """There are none."""

    async def send_device_state(self, data: bytes) -> None:
        """Send the device state."""
        await self._send([(DEVICES, data)])

    async def root(self) -> bytes:
        """The digest of all memory."""
        return memory_root(self._machine.guest.pages)

    async def finish(self) -> None:
        """End the lanes."""
        await together(*(lane.finish() for lane in self._lanes))

    async def close(self) -> None:
        """Nothing is held."""


class _SendingEnd:
    """One lane at the source."""

    def __init__(self, stub: Any, migration_id: bytes, token: bytes, lane: int, stall_s: float) -> None:
        self._stub = stub
        self._key = (migration_id, token, lane)
        self._stall_s = stall_s
        self._connection = 0
        self._numbering: SendingLane[tuple[int, int, Any]] = SendingLane(_WINDOW)

    async def carry(self, frames: list[tuple[int, Any]]) -> None:
        """Send frames; returns when all are at the destination."""
        for page, content in frames:
            while not self._numbering.has_room(1):
                await self._drain()
            frame = (self._numbering.next_sequence, page, content)
            self._numbering.sent(frame, frame_bytes=1, data_bytes=1)
        await self._drain()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        progressed = loop.time()
        while not self._numbering.idle:
            try:
                if not self._connection:
                    self._connection, frames = await self._call("OpenLane", self._key)
                    self._numbering.acknowledge(frames)
                for frame in self._numbering.unacknowledged():
                    self._numbering.acknowledge(
                        await self._call("SendFrame", Frame(*self._key, self._connection, *frame))
                    )
                    progressed = loop.time()
            except PeerUnreachableError:
                self._connection = 0
                if loop.time() - progressed > self._stall_s:
                    raise TimedOutError("no memory was acknowledged") from None
                await asyncio.sleep(_BACKOFF_S)

    async def finish(self) -> None:
        """Agree with the destination that the lane was whole."""
        await self._call("EndLane", (*self._key, self._numbering.totals))

    async def _call(self, method: str, request: Any) -> Any:
        return await getattr(self._stub, method)(request, timeout=_FRAME_S)


class Receiver:
    """The destination's side; takes the place of ``dest_svc.receiver.Receiver``."""

    def __init__(
        self,
        attempt: Attempt,
        spec: MachineSpec,
        directory: Directory,
        config: object,
        lanes: int,
        path: str,
        *,
        encodings: object,
        room: object,
    ) -> None:
        self.attempt = attempt
        self.spec = spec
        self.trace_id = ""
        self.transfer_token = secrets.token_bytes(4)
        self.progressed_at = asyncio.get_running_loop().time()
        self.reconnect_timeout_s = 0.0
        self.machine: Machine | None = None
        self.reserved_bytes = self.outstanding_bytes = self.memory_bytes = 0
        self._directory = directory
        self._lanes = [ReceivingLane() for _ in range(LANES)]
        self._connections = [0] * LANES
        self._ended = [asyncio.Event() for _ in range(LANES)]
        self._device_state = b""
        self._closed = False

    async def prepare(self) -> None:
        """Start the waiting hypervisor."""
        self.machine = self._directory.start(self.spec)
        await self.machine._operation("start")

    def open_lane(self, token: bytes, lane: int) -> tuple[int, int]:
        """A lane's new connection, and how many frames were taken in."""
        if token != self.transfer_token:
            raise PermissionDeniedError("that is not the token")
        self._connections[lane] += 1
        return self._connections[lane], self._lanes[lane].totals.frames

    def take(self, frame: Frame) -> int:
        """Take in one frame; returns how many were taken in."""
        if self._closed or frame.connection != self._connections[frame.lane]:
            raise StaleAttemptError("the attempt is closed, or the lane was reopened")
        lane = self._lanes[frame.lane]
        if lane.arrival(frame.sequence) is Arrival.NEW:
            assert self.machine is not None
            if frame.page == DEVICES:
                self._device_state = frame.content
            else:
                self.machine.guest.pages[frame.page] = frame.content
            lane.taken(1)
        self.progressed_at = asyncio.get_running_loop().time()
        return lane.totals.frames

    def end(self, lane: int, totals: Totals) -> None:
        """The source says that a lane was whole."""
        self._lanes[lane].check_end(totals)
        self._ended[lane].set()

    async def preflight(self) -> list[str]:
        """What stands in the way."""
        self.progressed_at = asyncio.get_running_loop().time()
        if self.machine is None or not await self.machine.alive():
            raise MachineDeadError("the waiting copy has died")
        return []

    async def seal_as(self, digest: bytes) -> bytes:
        """Load it all, if it is what the source sealed."""
        own = await self.seal()
        if own != digest:
            raise HashMismatchError("not what the source sealed", field="digest")
        return own

    async def seal(self) -> bytes:
        """Load the device state; returns the digest of what is here."""
        assert self.machine is not None
        try:
            async with asyncio.timeout(_LANES_END_S):
                for ended in self._ended:
                    await ended.wait()
        except TimeoutError as error:
            raise StreamBrokenError("lanes have not ended") from error
        if self.machine.guest.state.value == "inmigrate":
            await self.machine.load_device_state(self._device_state)
        root = memory_root(self.machine.guest.pages)
        return seal_digest(
            self.attempt, memory_root=root, device_state=self._device_state, spec_digest=self.spec.digest()
        )

    def acknowledgements(self) -> list[Any]:
        """Not asked for here."""
        return []

    async def release(self) -> None:
        """Let go of lanes."""
        self._closed = True

    async def discard(self) -> None:
        """End the waiting hypervisor."""
        await self.release()
        if self.machine is not None:
            await stop_machine(self.machine, self._directory)  # type: ignore[arg-type]
