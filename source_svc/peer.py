"""The destination as the source talks to it.

Promise: every call has a limit, goes only to the host whose identity is expected, and fails with an error of the
catalogue; an answer names the incarnation of the journal that gave it. A connection that is made anew is made with
the certificate that this host has by then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from functools import cached_property
from typing import Final, TypeVar

import grpc
import grpc.aio

from vmferry.errors import PeerIdentityError, PeerUnreachableError, VmferryError
from vmferry.handoff.records import attempt_to_ref
from vmferry.handoff.source import Heard
from vmferry.handoff.states import Attempt, AttemptState
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_to_message
from vmferry.negotiation.facts import Network
from vmferry.negotiation.report import PROTOCOL_VERSIONS
from vmferry.recovery.contact import Contact
from vmferry.rpc.status import from_rpc_error
from vmferry.rpc.tracing import ClientTracingInterceptors
from vmferry.security.identity import Identity
from vmferry.security.renewal import CurrentMaterial
from vmferry.security.tls import is_identity_mismatch, open_channel, open_lane_channel
from vmferry.v1 import clock_pb2, clock_pb2_grpc, compatibility_pb2, handoff_pb2, handoff_pb2_grpc

Answer = TypeVar("Answer")
_MEASURE: Final = "/vmferry.v1.DestinationService/Measure"
_SLOWEST_READING_BYTES_PER_S: Final = 100e6


class Destination:
    """One destination service, over connections of our own."""

    def __init__(
        self, address: str, expected: Identity, material: CurrentMaterial, *, rpc_timeout_s: float
    ) -> None:
        self.address = address
        self.expected = expected
        self._material = material
        self._timeout_s = rpc_timeout_s
        self._channels: list[grpc.aio.Channel] = []
        """For calls; the last one is in use."""
        self._connect()

    @cached_property
    def contact(self) -> Contact:
        """What was heard from it last."""
        return Contact()

    async def renew(self) -> None:
        """Connect anew: the old connection may wait before it tries again, or not have noticed that it is dead."""
        old = self._channels.pop()
        self._connect()
        await old.close(None)

    def new_channel(self) -> grpc.aio.Channel:
        """A channel with a connection of its own to the same host."""
        return open_channel(
            self.address, self.expected, self._material.get(), interceptors=ClientTracingInterceptors()
        )

    def new_lane_channel(self) -> grpc.Channel:
        """The same for a lane, which works in threads of its own; any thread may ask for it."""
        return open_lane_channel(self.address, self.expected, self._material.get())

    async def close(self) -> None:
        """Close the control connection."""
        for channel in self._channels:
            await channel.close(None)

    def _connect(self) -> None:
        self._proof = self._material.get()
        self._channels.append(self.new_channel())
        self._stub = handoff_pb2_grpc.DestinationServiceStub(self._channels[-1])

    def _connect_anew(self) -> None:
        """Prove who this is with a newer certificate, if there is one: a channel keeps its own for life."""
        if self._material.get() is not self._proof:
            self._connect()

    async def negotiate(
        self,
        spec: MachineSpec,
        networks: Sequence[Network],
        files: Sequence[compatibility_pb2.FileIdentity],
        *,
        timeout_s: float,
    ) -> handoff_pb2.NegotiateResponse:
        """What the host offers for this machine, whose interfaces and files are like this here."""
        request = handoff_pb2.NegotiateRequest(
            spec=spec_to_message(spec),
            protocol_versions=PROTOCOL_VERSIONS,
            networks=[
                compatibility_pb2.NetworkIdentity(tap=one.tap, bridge=one.bridge, mtu_bytes=one.mtu_bytes)
                for one in networks
            ],
            files=files,
        )
        return await self._ask(self._stub.Negotiate(request, timeout=timeout_s + _reading_s(files)))

    async def measure(
        self, channel: grpc.aio.Channel, requests: AsyncIterator[bytes]
    ) -> handoff_pb2.MeasureResponse:
        """Have pages taken in and forgotten, over a channel of :meth:`new_channel`; requests come as bytes."""
        method = channel.stream_unary(
            _MEASURE,
            request_serializer=None,
            response_deserializer=handoff_pb2.MeasureResponse.FromString,
        )
        answer: handoff_pb2.MeasureResponse = await self._ask(method(requests, timeout=self._timeout_s))
        return answer

    async def begin(
        self,
        attempt: Attempt,
        *,
        ticket: bytes,
        spec: MachineSpec,
        lanes: int,
        protocol_version: int,
        files: Sequence[compatibility_pb2.FileIdentity] = (),
        path: str,
        encodings: Sequence[str] = (),
        reconnect_timeout_s: float,
        timeout_s: float,
    ) -> handoff_pb2.BeginResponse:
        """Begin an attempt."""
        region = handoff_pb2.RegionLayout(name="ram", size_bytes=spec.memory_bytes)
        request = handoff_pb2.BeginRequest(
            attempt=attempt_to_ref(attempt),
            ticket=ticket,
            spec=spec_to_message(spec),
            regions=[region],
            lanes=lanes,
            protocol_version=protocol_version,
            files=files,
            path=path,
            encodings=encodings,
        )
        request.reconnect_timeout.FromNanoseconds(int(reconnect_timeout_s * 1e9))
        return await self._ask(self._stub.Begin(request, timeout=timeout_s + _reading_s(files)))

    async def preflight(self, attempt: Attempt, *, timeout_s: float) -> list[str]:
        """What stands in the destination's way of finishing the attempt now."""
        request = handoff_pb2.GetAttemptRequest(attempt=attempt_to_ref(attempt), preflight=True)
        response = await self._ask(self._stub.GetAttempt(request, timeout=timeout_s))
        return list(response.preflight_problems)

    async def look(self, attempt: Attempt) -> Heard:
        """How the attempt stands there; asking changes nothing."""
        question = handoff_pb2.GetAttemptRequest(attempt=attempt_to_ref(attempt))
        answer = await self._ask(self._stub.GetAttempt(question, timeout=self._timeout_s))
        return _heard(attempt, answer.status)

    async def seal(
        self,
        attempt: Attempt,
        digest: bytes,
        *,
        rounds: int,
        events: bytes,
        timeout_s: float,
        guest_clock_ns: int = 0,
    ) -> Heard:
        """Say that everything was sent; what is heard may be ready."""
        request = handoff_pb2.SealRequest(
            attempt=attempt_to_ref(attempt),
            digest=digest,
            rounds=rounds,
            scheduled_events=events,
            guest_clock_ns=guest_clock_ns,
        )
        response = await self._ask(self._stub.Seal(request, timeout=timeout_s))
        return self._noted(_heard(attempt, response.status))

    async def clock(self, attempt: Attempt, *, timeout_s: float) -> clock_pb2.ClockReport | None:
        """What became of the clock of a guest that runs there; ``None`` if that host has not looked after it."""
        request = clock_pb2.GetClockRequest(attempt=attempt_to_ref(attempt))
        stub = clock_pb2_grpc.ClockServiceStub(self._channels[-1])
        answer = await self._ask(stub.GetClock(request, timeout=timeout_s))
        return answer.clock if answer.HasField("clock") else None

    async def tell(
        self, method: str, attempt: Attempt, *, digest: bytes, reason: str, superseded_by: int = 0
    ) -> Heard:
        """Call ``Go``, ``Abort`` or ``GetAttempt`` once; every answer is what the destination's journal says.

        With ``superseded_by``, an Abort says which later right this host has by now.
        """
        ref = attempt_to_ref(attempt)
        match method:
            case "Go":
                go = handoff_pb2.GoRequest(attempt=ref, digest=digest)
                status = (await self._ask(self._stub.Go(go, timeout=self._timeout_s))).status
            case "Abort":
                abort = handoff_pb2.AbortRequest(
                    attempt=ref, reason=reason, superseded_by_epoch=superseded_by
                )
                status = (await self._ask(self._stub.Abort(abort, timeout=self._timeout_s))).status
            case "GetAttempt":
                question = handoff_pb2.GetAttemptRequest(attempt=ref, close_unseen=True)
                status = (await self._ask(self._stub.GetAttempt(question, timeout=self._timeout_s))).status
            case _:
                raise ValueError(f"no such method: {method}")
        return self._noted(_heard(attempt, status))

    def _noted(self, heard: Heard) -> Heard:
        known = heard.attempt.destination_incarnation
        self.contact.hear_state(heard.state, lost_journal=known not in ("", heard.incarnation))
        return heard

    async def _ask(self, call: Awaitable[Answer]) -> Answer:
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            failure = self._translated(error)
            self.contact.fail(failure)
            if isinstance(failure, PeerUnreachableError):
                self._connect_anew()
            raise failure from error
        self.contact.hear("an answer")
        return answer

    def _translated(self, error: grpc.aio.AioRpcError) -> VmferryError:
        if is_identity_mismatch(error):
            return PeerIdentityError(
                f"the host at {self.address} is not {self.expected}", field="destination.host"
            )
        return from_rpc_error(error)


def _reading_s(files: Iterable[compatibility_pb2.FileIdentity]) -> float:
    """How long the destination may take to read what it has to compare by content."""
    return sum(file.size_bytes for file in files if file.sha256) / _SLOWEST_READING_BYTES_PER_S


def _heard(attempt: Attempt, status: handoff_pb2.AttemptStatus) -> Heard:
    return Heard(
        attempt,
        AttemptState(status.state or AttemptState.UNSEEN.value),
        status.destination_incarnation,
        digest=status.digest,
        memory_intact=False,  # for the source to say, as the next; the destination cannot know
        tail_certain=False,
    )
