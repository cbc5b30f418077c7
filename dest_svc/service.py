"""The calls of ``DestinationService``.

Promise: identity comes from the caller's certificate, never from a message; nothing is allocated, recorded or
answered about a machine before caller, ticket and attempt fit together.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

import grpc

from dest_svc.arrival import Arrival
from dest_svc.clock_service import ClockService
from dest_svc.judging import Judge, check_begin
from dest_svc.measuring import Measurements
from dest_svc.offer import guest_cpuid, make_offer
from dest_svc.outcomes import reason_of_error, turned_away
from dest_svc.override import Accepting
from dest_svc.receiver import Receiver
from dest_svc.room import Room
from dest_svc.settling import DestinationPart
from dest_svc.watching import watch
from vmferry.errors import (
    AttemptNotFoundError,
    HashMismatchError,
    HostDrainingError,
    InvalidArgumentError,
    MachineDeadError,
    PermissionDeniedError,
    ServiceStoppingError,
    StaleAttemptError,
    VmferryError,
    WrongPhaseError,
)
from vmferry.events.files import BoardFiles
from vmferry.failpoints import reach
from vmferry.handoff import destination
from vmferry.handoff.ledger import Role
from vmferry.handoff.records import attempt_from_ref
from vmferry.handoff.states import Answer, Attempt, AttemptState
from vmferry.machines import host
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_from_message
from vmferry.negotiation.findings import Severity
from vmferry.negotiation.path import DIRECT
from vmferry.recovery.service import RecoveryService
from vmferry.rpc.daemon import Host
from vmferry.rpc.handlers import read_requests_with
from vmferry.rpc.interceptors import current_caller
from vmferry.security.identity import Kind
from vmferry.security.override import ACCEPT, by_word
from vmferry.security.tickets import VerifiedTicket
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import phase, span_attributes
from vmferry.together import to_the_end
from vmferry.transfer.wire import ChunkFrame, Received, decode_measured, decode_request
from vmferry.v1 import compatibility_pb2, handoff_pb2, handoff_pb2_grpc, transfer_pb2
from vmferry.v1.handoff_pb2 import DESCRIPTOR

_LOG: Final = get_logger(__name__)

Context = grpc.aio.ServicerContext[object, object]


class DestinationService(handoff_pb2_grpc.DestinationServiceServicer):
    """Takes machines in."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._config = host.config
        self._ledger = host.ledger
        self._directory = host.directory
        self._own = host.own
        self._arrivals: dict[str, Arrival] = {}
        self._judge = Judge(host.config)
        self._room = Room(host.config, host.directory, self._arrivals, closed=lambda: self._judge.draining)
        self._part = DestinationPart(self._arrivals)
        self._recovery = RecoveryService(host, Role.DESTINATION, self._part)
        self._admission = asyncio.Lock()
        self._accepting = Accepting(host, self._arrival)
        self._measurements = Measurements(host.config.ram_dir, lambda: self._room.ready.ready_bytes > 0)
        self._stopping = False
        self._watcher: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the methods to a server."""
        handoff_pb2_grpc.add_DestinationServiceServicer_to_server(self, server)
        name = DESCRIPTOR.services_by_name["DestinationService"].full_name
        # The two that carry memory are read without a copy.
        read_requests_with(server, name, self.Transfer, decode_request)
        read_requests_with(server, name, self.Measure, decode_measured)
        clocks = ClockService(self._arrivals, self._attempt)
        return [name, self._recovery.register(server), clocks.register(server)]

    async def recover(self) -> None:
        """Bring every machine that was arriving into the state its journal asks for; called once, before serving."""
        for machine_id in self._ledger.machines(Role.DESTINATION):
            try:
                await self._arrival(machine_id).recover()
            except VmferryError as error:
                _LOG.critical(
                    "a machine needs an operator", machine=machine_id, reason=error.reason, detail=str(error)
                )
        self._watcher = asyncio.create_task(watch(self._arrivals, self._config))
        self._room.ready.start()

    async def wind_down(self) -> int:
        """Take nothing new; how many machines are arriving."""
        self._stopping = True
        return sum(arrival.receiver is not None for arrival in self._arrivals.values())

    async def stop(self) -> None:
        """Give back what unfinished attempts hold; prepared copies stay."""
        self._stopping = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        for arrival in self._arrivals.values():
            with contextlib.suppress(VmferryError):
                await arrival.give_up("the destination service stops")

    async def close(self) -> None:
        """Let go of the journals, and of memory that is kept for nobody."""
        self._recovery.close()
        await self._room.ready.close()
        for arrival in self._arrivals.values():
            await arrival.close()

    # Calls

    async def Negotiate(
        self, request: handoff_pb2.NegotiateRequest, context: Context
    ) -> handoff_pb2.NegotiateResponse:
        """Say what this host can offer."""
        response = handoff_pb2.NegotiateResponse(
            offer=await asyncio.to_thread(self._offer, request.spec.uuid),
            destination_incarnation=self._ledger.incarnation,
        )
        if request.HasField("spec"):
            spec = spec_from_message(request.spec)
            found = await self._judge.against(spec, request.files, request.networks)
            response.items.extend(refusal.item() for refusal in found)
            response.cpuid.extend(await asyncio.to_thread(guest_cpuid, spec, self._config))
        # The last thing: the clocks are compared by it.
        response.offer.time.GetCurrentTime()
        return response

    async def Measure(  # type: ignore[override]  # its requests are read by a function of our own
        self, request_iterator: AsyncIterator[ChunkFrame], context: Context
    ) -> handoff_pb2.MeasureResponse:
        """Take pages in, check and forget them."""
        if self._stopping:
            raise ServiceStoppingError("the destination service is stopping")
        return await self._measurements.measure(current_caller(), request_iterator)

    async def Begin(self, request: handoff_pb2.BeginRequest, context: Context) -> handoff_pb2.BeginResponse:
        """Accept an attempt and make an empty, waiting copy for it."""
        with turned_away():
            if self._stopping:
                raise ServiceStoppingError("the destination service is stopping")
            if self._judge.draining:
                raise HostDrainingError(f"{self._own} is being emptied and takes no newcomers")
            attempt = self._attempt(request.attempt)
            spec, ticket = await asyncio.to_thread(check_begin, request, attempt, self._host)
            for refusal in await self._judge.against(spec, request.files):
                if refusal.severity is Severity.BLOCKS:
                    raise refusal.error()
        span_attributes(machine=spec.name, migration_id=attempt.migration_id.hex())
        receiver = await to_the_end(self._admit(attempt, spec, ticket, request))
        response = handoff_pb2.BeginResponse(
            destination_incarnation=self._ledger.incarnation,
            transfer_token=receiver.transfer_token,
            window_bytes=self._config.window_bytes,
        )
        response.reconnect_timeout.FromNanoseconds(int(receiver.reconnect_timeout_s * 1e9))
        return response

    async def Transfer(
        self, request_iterator: AsyncIterator[Received], context: Context
    ) -> AsyncIterator[transfer_pb2.TransferResponse]:
        """Carry one lane."""
        opening = await anext(aiter(request_iterator), None)
        if not isinstance(opening, transfer_pb2.TransferRequest) or opening.WhichOneof("message") != "open":
            raise InvalidArgumentError("a lane starts with its opening", field="open")
        receiver = self._receiver(opening.open.migration_id)
        if current_caller().uri != receiver.attempt.source:
            raise PermissionDeniedError("only the attempt's source may send its memory")
        lane = receiver.lane(opening.open)
        async with phase("receive", lane=opening.open.lane):
            async for response in receiver.serve(lane, request_iterator, opening.open.connection):
                yield response

    async def Seal(self, request: handoff_pb2.SealRequest, context: Context) -> handoff_pb2.SealResponse:
        """Verify and load the copy."""
        attempt = self._attempt(request.attempt)
        self._part.hear(attempt, "Seal")
        arrival = self._arrivals.get(attempt.machine_id)
        if arrival is None:  # nothing is made for a machine that nobody has begun to send
            raise WrongPhaseError("there is no such attempt to seal", field="attempt")
        own = await to_the_end(self._seal(arrival, attempt, request))
        return handoff_pb2.SealResponse(status=self._status(arrival, attempt), digest=own)

    async def Go(self, request: handoff_pb2.GoRequest, context: Context) -> handoff_pb2.GoResponse:
        """Take the right to run, and run."""
        attempt = self._attempt(request.attempt)
        self._part.hear(attempt, "Go")
        arrival = self._arrivals.get(attempt.machine_id)
        if arrival is None:
            return handoff_pb2.GoResponse(status=self._message(Answer(AttemptState.UNSEEN)))
        # A caller that goes away must not leave a machine owned and not resumed.
        return handoff_pb2.GoResponse(status=await to_the_end(self._go(arrival, attempt, request.digest)))

    async def GetAttempt(
        self, request: handoff_pb2.GetAttemptRequest, context: Context
    ) -> handoff_pb2.GetAttemptResponse:
        """Say from the journal how an attempt stands."""
        attempt = self._attempt(request.attempt, read_only=not request.close_unseen)
        if request.close_unseen:
            self._part.hear(attempt, "GetAttempt")
            status = await to_the_end(self._close_unseen(attempt))
            return handoff_pb2.GetAttemptResponse(status=status)
        if attempt.machine_id not in self._arrivals:  # a question leaves nothing behind
            return handoff_pb2.GetAttemptResponse(status=self._message(Answer(AttemptState.UNSEEN)))
        arrival = self._arrival(attempt.machine_id)
        response = handoff_pb2.GetAttemptResponse(status=self._status(arrival, attempt))
        receiver = arrival.receiver
        if receiver is not None and receiver.attempt.matches(attempt):
            response.reserved_bytes = receiver.reserved_bytes
            response.lanes.extend(receiver.acknowledgements())
        if request.preflight:
            if response.status.state == handoff_pb2.ATTEMPT_STATE_REFUSED:
                raise StaleAttemptError(f"the destination has closed the attempt: {response.status.refusal}")
            if receiver is None:
                raise WrongPhaseError("no attempt is open for this machine", field="attempt")
            response.preflight_problems.extend(await receiver.preflight())
            await asyncio.to_thread(arrival.probe_journal)
        return response

    async def Abort(self, request: handoff_pb2.AbortRequest, context: Context) -> handoff_pb2.AbortResponse:
        """Close an attempt, unless it is too late."""
        attempt = self._attempt(request.attempt)
        self._part.hear(attempt, "Abort")
        arrival = self._arrival(attempt.machine_id)
        return handoff_pb2.AbortResponse(status=await to_the_end(self._abort(arrival, attempt, request)))

    async def ForceAccept(
        self, request: handoff_pb2.ForceAcceptRequest, context: Context
    ) -> handoff_pb2.ForceAcceptResponse:
        """Take a machine by an admin's word."""
        asks = request.validate_only
        # A caller that goes away must not leave a machine owned and not resumed.
        work = by_word(ACCEPT, request.override, current_caller(), self._accepting.decide, only_asked=asks)
        return handoff_pb2.ForceAcceptResponse(report=await to_the_end(work))

    # What they are made of

    def _attempt(self, ref: handoff_pb2.AttemptRef, *, read_only: bool = False) -> Attempt:
        """The attempt a call is about; only its source may call, and only at its destination."""
        if not host.is_machine_id(ref.machine_id):
            raise InvalidArgumentError("machine_id must be a lower-case UUID", field="attempt.machine_id")
        try:
            attempt = attempt_from_ref(ref)
        except ValueError as error:
            raise InvalidArgumentError(str(error), field="attempt") from error
        if attempt.destination != self._own.uri:
            raise PermissionDeniedError(f"the attempt is for {attempt.destination}, this is {self._own}")
        caller = current_caller()
        if caller.uri != attempt.source and not (read_only and caller.kind is not Kind.VMHOST):
            raise PermissionDeniedError(f"{caller} is not the attempt's source")
        if caller.uri == attempt.source and attempt.machine_id in self._arrivals:
            self._arrivals[attempt.machine_id].heard_at = time.monotonic()
        if attempt.destination_incarnation not in ("", self._ledger.incarnation):
            raise WrongPhaseError(
                "this host's journal is not the one the attempt was begun with",
                field="attempt.destination_incarnation",
                remedy="The host lost its journal; an operator must decide (docs/handoff.md).",
            )
        return attempt

    async def _admit(
        self, attempt: Attempt, spec: MachineSpec, ticket: VerifiedTicket, request: handoff_pb2.BeginRequest
    ) -> Receiver:
        async with self._admission:
            with turned_away():
                self._room.check(attempt, spec)
                arrival = self._arrival(attempt.machine_id)
            async with arrival.lock:
                with turned_away():
                    await self._accept(arrival, attempt, ticket)
                return await self._receive(arrival, attempt, spec, request)

    async def _accept(self, arrival: Arrival, attempt: Attempt, ticket: VerifiedTicket) -> None:
        async with self._ledger.locked(attempt.machine_id):
            rights = self._ledger.rights(arrival.machine_id)
            leftover, spent = self._leftover(arrival), rights.proved_gone_by(attempt)
            await arrival.apply(
                destination.BeginAsked(
                    attempt,
                    ticket.nonce,
                    int(ticket.start_by.timestamp()),
                    host_holds_machine=not rights.admits(attempt) or (leftover and not spent),
                    stale_copy=leftover and spent,
                )
            )

    async def _receive(
        self, arrival: Arrival, attempt: Attempt, spec: MachineSpec, request: handoff_pb2.BeginRequest
    ) -> Receiver:
        if arrival.receiver is None:
            path = request.path or DIRECT
            arrival.receiver = Receiver(
                attempt,
                spec,
                self._directory,
                self._config,
                request.lanes,
                path,
                encodings=request.encodings,
                room=self._room,
            )
            wanted_s = max(0.0, request.reconnect_timeout.ToNanoseconds() / 1e9)
            arrival.receiver.reconnect_timeout_s = min(wanted_s, self._config.max_reconnect_timeout_s)
            try:
                async with asyncio.timeout(self._config.reserve_timeout_s):
                    await arrival.receiver.prepare()
            except BaseException as error:
                await arrival.lose_copy(f"the copy could not be made: {error}", reason_of_error(error))
                raise
        return arrival.receiver

    def _leftover(self, arrival: Arrival) -> bool:
        """Whether this host has a hypervisor of the machine that is not an attempt's waiting copy."""
        if isinstance(arrival.state.current, (destination.Receiving, destination.Prepared)):
            return False
        return any(record.spec.uuid == arrival.machine_id for record in self._directory.list())

    async def _seal(self, arrival: Arrival, attempt: Attempt, request: handoff_pb2.SealRequest) -> bytes:
        digest = request.digest
        async with arrival.lock:
            now, receiver = arrival.state.current, arrival.receiver
            if (
                not isinstance(now, destination.Receiving)
                or not now.attempt.matches(attempt)
                or receiver is None
            ):
                # Answers a repetition and refuses the rest.
                await arrival.apply(destination.Verified(attempt, digest))
                return digest if arrival.answer(attempt).state is AttemptState.PREPARED else b""
            files = BoardFiles(self._config.events_dir)
            # Read while the hypervisor loads, stored when all is seen to be right.
            board = files.arriving(attempt.machine_id, request.scheduled_events)
            try:
                own = await receiver.seal_as(digest)
                if request.guest_clock_ns:
                    await receiver.keep_clock(request.guest_clock_ns)
            except (HashMismatchError, MachineDeadError) as error:
                await arrival.lose_copy(error.message, error.reason)
                raise
            reach("dest.verified")
            files.take(attempt.machine_id, board)
            await arrival.apply(destination.Verified(attempt, own))
            arrival.settle_records()
            return own

    async def _go(self, arrival: Arrival, attempt: Attempt, digest: bytes) -> handoff_pb2.AttemptStatus:
        async with arrival.lock, phase("own"):
            await arrival.go(attempt, digest)
            return self._status(arrival, attempt)

    async def _abort(
        self, arrival: Arrival, attempt: Attempt, request: handoff_pb2.AbortRequest
    ) -> handoff_pb2.AttemptStatus:
        event = destination.CloseAsked(
            attempt, request.reason[:200], superseded_by=request.superseded_by_epoch
        )
        async with arrival.lock:
            return self._message(await arrival.close_attempt(event) or arrival.answer(attempt))

    async def _close_unseen(self, attempt: Attempt) -> handoff_pb2.AttemptStatus:
        arrival = self._arrival(attempt.machine_id)
        async with arrival.lock:
            return self._message(
                await arrival.apply(destination.StatusAsked(attempt)) or arrival.answer(attempt)
            )

    def _status(self, arrival: Arrival, attempt: Attempt) -> handoff_pb2.AttemptStatus:
        return self._message(arrival.answer(attempt))

    def _message(self, answer: Answer) -> handoff_pb2.AttemptStatus:
        return handoff_pb2.AttemptStatus(
            state=handoff_pb2.AttemptState.ValueType(answer.state.value),
            destination_incarnation=self._ledger.incarnation,
            refusal=answer.refusal,
            digest=answer.digest,
        )

    def _arrival(self, machine_id: str) -> Arrival:
        if machine_id not in self._arrivals:
            self._arrivals[machine_id] = Arrival(
                machine_id,
                self._ledger,
                self._directory,
                resume_retry_s=self._config.handoff_retry_s,
                agent_timeout_s=self._config.agent_timeout_s,
                on_broken_journal=self._host.journal_broken,
            )
        return self._arrivals[machine_id]

    def _receiver(self, migration_id: bytes) -> Receiver:
        for arrival in self._arrivals.values():
            if arrival.receiver is not None and arrival.receiver.attempt.migration_id == migration_id:
                return arrival.receiver
        raise AttemptNotFoundError("no such attempt is open here", field="open.migration_id")

    def _offer(self, newcomer: str) -> compatibility_pb2.HostOffer:
        receivers = [arrival.receiver for arrival in self._arrivals.values() if arrival.receiver]
        return make_offer(
            self._own,
            self._ledger,
            self._directory,
            self._host.trackers,
            qemu_binaries=self._config.qemu_binaries,
            backings=self._room.backings(),
            ready_memory_bytes=self._room.ready.ready_bytes,
            reserved_memory_bytes=sum(receiver.memory_bytes for receiver in receivers),
            incoming=sum(receiver.spec.uuid != newcomer for receiver in receivers),
            max_incoming=self._config.max_incoming,
            draining=self._judge.draining,
            certificate_not_after=self._host.tls.load().not_after,
            newcomer=newcomer,
        )
