"""A source that says whatever a test wants, with the certificate of a host and the real stubs.

Promise: nothing but what a test asks for is sent, and nothing of it is checked here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
from xxhash import xxh3_128, xxh3_128_digest

from tests.integration.hosts import MIB, Guest, World
from tests.integration.services import DEADLINE_S, Host, eventually
from vmferry.cli.machine import end_machine
from vmferry.errors import VmferryError
from vmferry.handoff.records import attempt_from_ref
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.launcher import start_machine, stop_machine
from vmferry.machines.microvm.spec import MicrovmSpec
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_to_message
from vmferry.memory.digest import PageTable
from vmferry.memory.runs import PAGE_SIZE
from vmferry.rpc.status import from_rpc_error
from vmferry.security.tls import open_channel
from vmferry.transfer.seal import seal_digest
from vmferry.v1 import handoff_pb2, transfer_pb2
from vmferry.v1.handoff_pb2_grpc import DestinationServiceStub
from vmferry.v1.ticket_pb2 import SignedTicket, Ticket

if TYPE_CHECKING:  # the stub's type exists for checkers only
    from vmferry.v1.handoff_pb2_grpc import DestinationServiceAsyncStub

Request = transfer_pb2.TransferRequest
END_OF_STREAM: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in its stubs
MEMORY_MIB = 4
PAGES = MEMORY_MIB * MIB // PAGE_SIZE
ZEROS = PageTable(PAGES).root()
"""The digest of memory that nothing was written to."""


@dataclass
class Model:
    """A machine that never runs, and what its device state looks like."""

    spec: MachineSpec
    device_state: bytes


async def make_model() -> Model:
    """Ask a hypervisor for the device state of a machine that has executed nothing."""
    with (
        tempfile.TemporaryDirectory(prefix="vf-") as run,
        tempfile.TemporaryDirectory(prefix="vf-", dir="/dev/shm") as ram,
    ):
        directory = MachineDirectory(Path(run) / "m", Path(ram) / "r")
        spec = MachineSpec(
            name="model",
            uuid=str(uuid.uuid4()),
            memory_mib=MEMORY_MIB,
            microvm=MicrovmSpec(program="canary", params={"resident-mib": "1"}, mac="52:54:00:00:00:01"),
        )
        machine = await start_machine(spec, directory)
        try:
            return Model(spec, await machine.save_device_state())
        finally:
            await stop_machine(machine, directory)


@dataclass
class Lane:
    """One stream of frames."""

    call: Any
    sequence: int = 0
    data_bytes: int = 0
    digest: Any = field(default_factory=xxh3_128)

    async def send(self, request: Request) -> transfer_pb2.TransferResponse:
        """Send a message and return its answer; raises the destination's error as one of the catalogue."""
        try:
            return await self.send_raw(request)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def send_raw(self, request: Request) -> transfer_pb2.TransferResponse:
        """Send a message and return its answer; raises what gRPC raises."""
        await self.call.write(request)
        response = await self.call.read()
        if response is END_OF_STREAM:
            await self.call.read()  # raises the error that the stream ended with
            raise AssertionError("the destination ended the stream without an error")
        assert isinstance(response, transfer_pb2.TransferResponse)
        return response

    def chunk(self, pairs: Iterable[tuple[int, int]] = (), data: bytes = b"", **changes: Any) -> Request:
        """The next chunk of this lane, with pages in runs of first page and count."""
        self.sequence += 1
        self.data_bytes += len(data)
        values: dict[str, Any] = {
            "sequence": self.sequence,
            "round": 1,
            "encoding": transfer_pb2.ENCODING_NONE,
            "runs": [transfer_pb2.PageRun(first_page=first, page_count=count) for first, count in pairs],
            "data": data,
            "data_hash": xxh3_128_digest(data),
        } | changes
        self.digest.update(values["data_hash"])
        return Request(chunk=transfer_pb2.Chunk(**values))

    def device_state(self, offset: int, total_bytes: int, data: bytes) -> Request:
        """The next piece of device state."""
        self.sequence += 1
        self.data_bytes += len(data)
        piece = transfer_pb2.DeviceState(
            sequence=self.sequence, offset=offset, total_bytes=total_bytes, data=data
        )
        return Request(device_state=piece)

    def end(self, **changes: Any) -> Request:
        """The end of this lane as it went."""
        values = {"frames": self.sequence, "data_bytes": self.data_bytes, "digest": self.digest.digest()}
        return Request(end=transfer_pb2.LaneEnd(**(values | changes)))


class RawSource:
    """One attempt to move a machine that is nowhere, to a real destination."""

    def __init__(self, world: World, to: Host, model: Model, channel: grpc.aio.Channel) -> None:
        name = f"raw-{secrets.token_hex(4)}"
        self.world = world
        self.to = to
        self.model = model
        self.spec = dataclasses.replace(model.spec, name=name, uuid=str(uuid.uuid4()))
        self.guest = Guest(self.spec, world.a)
        self.stub: DestinationServiceAsyncStub = DestinationServiceStub(channel)
        self.token = b""
        self.ticket = world.ticket(self.guest, world.a, to)
        signed = Ticket.FromString(SignedTicket.FromString(self.ticket).ticket)
        self.ref = handoff_pb2.AttemptRef(
            machine_id=self.spec.uuid,
            migration_id=signed.migration_id,
            attempt=1,
            epoch_from=1,
            epoch_to=2,
            source=world.a.identity.uri,
            destination=to.identity.uri,
            source_incarnation=str(uuid.uuid4()),
        )

    def begin_request(self, **changes: Any) -> handoff_pb2.BeginRequest:
        """A Begin that is right, but for what is changed."""
        values: dict[str, Any] = {
            "attempt": self.ref,
            "ticket": self.ticket,
            "spec": spec_to_message(self.spec),
            "regions": [handoff_pb2.RegionLayout(name="ram", size_bytes=MEMORY_MIB * MIB)],
            "lanes": 2,
            "protocol_version": 1,
        }
        return handoff_pb2.BeginRequest(**(values | changes))

    async def begin(self, **changes: Any) -> handoff_pb2.BeginResponse:
        """Begin, as it should be but for what is changed."""
        self.world.guests.append(self.guest)
        response = await self.stub.Begin(self.begin_request(**changes), timeout=DEADLINE_S)
        self.token = response.transfer_token
        self.ref.destination_incarnation = response.destination_incarnation
        return response

    async def open_lane(self, number: int = 0, **changes: Any) -> Lane:
        """Open a lane; raises the destination's error."""
        call: Any = self.stub.Transfer(timeout=DEADLINE_S)  # type: ignore[call-arg]  # written to by hand
        values: dict[str, Any] = {
            "migration_id": self.ref.migration_id,
            "transfer_token": self.token,
            "lane": number,
        }
        lane = Lane(call)
        answer = await lane.send(Request(open=transfer_pb2.LaneOpen(**(values | changes))))
        assert answer.WhichOneof("message") == "welcome"
        return lane

    async def send_everything(self) -> None:
        """Two lanes of empty memory and the device state."""
        first, second = [await self.open_lane(number) for number in range(2)]
        state = self.model.device_state
        await first.send(first.device_state(0, len(state), state))
        for lane in (first, second):
            assert (await lane.send(lane.end())).WhichOneof("message") == "ended"

    @property
    def digest(self) -> bytes:
        """What is to be sealed after :meth:`send_everything`."""
        return seal_digest(
            attempt_from_ref(self.ref),
            memory_root=ZEROS,
            device_state=self.model.device_state,
            spec_digest=self.spec.digest(),
        )

    async def seal(self, **changes: Any) -> handoff_pb2.SealResponse:
        """Seal what was sent."""
        values: dict[str, Any] = {"attempt": self.ref, "digest": self.digest, "rounds": 1} | changes
        return await self.stub.Seal(handoff_pb2.SealRequest(**values), timeout=DEADLINE_S)

    async def go(self, **changes: Any) -> handoff_pb2.AttemptStatus:
        """Give the right to run."""
        values: dict[str, Any] = {"attempt": self.ref, "digest": self.digest} | changes
        return (await self.stub.Go(handoff_pb2.GoRequest(**values), timeout=DEADLINE_S)).status

    async def abort(self, **changes: Any) -> handoff_pb2.AttemptStatus:
        """Close the attempt."""
        values: dict[str, Any] = {"attempt": self.ref, "reason": "the test is over"} | changes
        return (await self.stub.Abort(handoff_pb2.AbortRequest(**values), timeout=DEADLINE_S)).status

    async def until_nothing_is_held(self) -> None:
        """Wait until the destination has let go of everything this attempt made it hold."""
        await eventually(
            lambda: not self.to.holdings(self.spec), "the destination holds nothing of the attempt"
        )

    async def end_guest(self) -> None:
        """End the machine at the destination, which owns it now."""
        await end_machine(self.guest.id, self.to.config)

    async def status(self) -> handoff_pb2.AttemptStatus:
        """How the attempt stands."""
        request = handoff_pb2.GetAttemptRequest(attempt=self.ref)
        return (await self.stub.GetAttempt(request, timeout=DEADLINE_S)).status


@contextlib.asynccontextmanager
async def raw_source(world: World, to: Host, model: Model, who: str = "a") -> AsyncIterator[RawSource]:
    """A raw source with a certificate of choice; what it began is closed at the end."""
    async with open_channel(to.dest.address, to.identity, world.material(who)) as channel:
        source = RawSource(world, to, model, channel)
        yield source
        if source.token:
            with contextlib.suppress(VmferryError, grpc.aio.AioRpcError):
                await source.abort()
