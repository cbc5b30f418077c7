"""The destination as the source talks to it.

Promise: every call has a limit, goes only to the host whose identity is expected, and fails with an error of the
catalogue; an answer names the incarnation of the journal that gave it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from typing import Final, TypeVar

import grpc
import grpc.aio

from vmferry.errors import PeerIdentityError
from vmferry.handoff.records import attempt_to_ref
from vmferry.handoff.source import Heard
from vmferry.handoff.states import Attempt, AttemptState
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_to_message
from vmferry.negotiation.facts import Network
from vmferry.negotiation.report import PROTOCOL_VERSIONS
from vmferry.rpc.status import from_rpc_error
from vmferry.rpc.tracing import ClientTracingInterceptors
from vmferry.security.identity import Identity
from vmferry.security.material import TlsMaterial
from vmferry.security.tls import is_identity_mismatch, open_channel
from vmferry.v1 import compatibility_pb2, handoff_pb2, handoff_pb2_grpc

Answer = TypeVar("Answer")
_SLOWEST_READING_BYTES_PER_S: Final = 100e6


class Destination:
    """One destination service, over connections of our own."""

    def __init__(
        self, address: str, expected: Identity, material: TlsMaterial, *, rpc_timeout_s: float
    ) -> None:
        self.address = address
        self.expected = expected
        self._material = material
        self._timeout_s = rpc_timeout_s
        self._channel = self.new_channel()
        self._stub = handoff_pb2_grpc.DestinationServiceStub(self._channel)

    def new_channel(self) -> grpc.aio.Channel:
        """A channel with a connection of its own to the same host."""
        return open_channel(
            self.address, self.expected, self._material, interceptors=ClientTracingInterceptors()
        )

    async def close(self) -> None:
        """Close the control connection."""
        await self._channel.close(None)

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
        self, channel: grpc.aio.Channel, requests: AsyncIterator[handoff_pb2.MeasureRequest]
    ) -> handoff_pb2.MeasureResponse:
        """Have pages taken in and forgotten, over a channel of :meth:`new_channel`."""
        stub = handoff_pb2_grpc.DestinationServiceStub(channel)
        return await self._ask(stub.Measure(requests, timeout=self._timeout_s))

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
        )
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

    async def seal(self, attempt: Attempt, digest: bytes, *, rounds: int, timeout_s: float) -> Heard:
        """Say that everything was sent; what is heard may be ready."""
        request = handoff_pb2.SealRequest(attempt=attempt_to_ref(attempt), digest=digest, rounds=rounds)
        response = await self._ask(self._stub.Seal(request, timeout=timeout_s))
        return _heard(attempt, response.status)

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
        return _heard(attempt, status)

    async def _ask(self, call: Awaitable[Answer]) -> Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            if is_identity_mismatch(error):
                raise PeerIdentityError(
                    f"the host at {self.address} is not {self.expected}", field="destination.host"
                ) from error
            raise from_rpc_error(error) from error


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
