"""Availability sets whose machines are on several hosts: what those hosts tell, and what this one tells them.

Promise: what another host last told is believed until it tells something else, or has been silent for an hour; one
that cannot be asked holds nobody up; boards that make no sense are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import grpc
import grpc.aio

from source_svc.announcing import Announcements
from vmferry.errors import ConfigError, InvalidArgumentError, VmferryError
from vmferry.events import records
from vmferry.events.states import Board
from vmferry.machines.spec import MachineSpec
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity
from vmferry.security.renewal import CurrentMaterial
from vmferry.security.tls import open_channel
from vmferry.telemetry.logs import get_logger
from vmferry.v1 import events_pb2, events_pb2_grpc

_LOG: Final = get_logger(__name__)
_PEER: Final = re.compile(
    r"(?P<host>spiffe://[^=\s]+)=(?P<address>(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5})"
)
_ASK_S: Final = 1.0
"""How often other hosts are asked, and how long an answer may take."""
_BELIEVED_S: Final = 3600.0
_MAX_SETS: Final = 1000
_MAX_BOARDS: Final = 10_000
_MAX_NAME_CHARS: Final = 256


@dataclass(frozen=True)
class Distant:
    """A board of another host."""

    machine_id: str
    availability_set: str
    board: Board


@dataclass
class _Peer:
    """Another host."""

    host: Identity
    address: str
    boards: Sequence[Distant] = ()
    heard_at: float = 0.0
    silent: bool = False
    channel: grpc.aio.Channel | None = None
    proof: object = field(default=None, repr=False)
    hurried: asyncio.Event = field(default_factory=asyncio.Event)
    approvals: dict[str, events_pb2.ApproveEventsRequest] = field(default_factory=dict)
    """What machines here have acknowledged and it has not been told of, by event."""


class Neighbours:
    """The hosts that ``event_peers`` names."""

    def __init__(self, host: Host, residents: Callable[[], Sequence[MachineSpec]]) -> None:
        self._material = CurrentMaterial(host.tls)
        self._residents = residents
        self._peers = [_parsed(text, host.own) for text in host.config.event_peers]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Ask all of them once, so that no guest misses what is under way, and then again and again."""
        await asyncio.gather(*(self._ask(peer) for peer in self._peers))
        self._tasks = [asyncio.create_task(self._keep(peer)) for peer in self._peers]

    async def close(self) -> None:
        """Ask nobody any more; safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for peer in self._peers:
            if peer.channel is not None:
                await peer.channel.close(None)
                peer.channel = None

    def boards(self, availability_set: str) -> list[Board]:
        """What machines of a set are told on other hosts."""
        now = time.monotonic()
        return [
            one.board
            for peer in self._peers
            if now - peer.heard_at < _BELIEVED_S
            for one in peer.boards
            if availability_set and one.availability_set == availability_set
        ]

    def hurry(self) -> None:
        """Ask now: a machine has come that may be of a set that nobody was asked for."""
        for peer in self._peers:
            peer.hurried.set()

    def approve(self, spec: MachineSpec, event_ids: Sequence[str]) -> None:
        """A machine acknowledges events: their hosts are told, and told again until they have heard it."""
        wanted = {event_id.upper() for event_id in event_ids}
        for peer in self._peers:
            for one in peer.boards:
                if not spec.availability_set or one.availability_set != spec.availability_set:
                    continue
                for event in one.board.events:
                    if event.id.upper() in wanted and not event.approved_by:
                        peer.approvals[event.id] = events_pb2.ApproveEventsRequest(
                            availability_set=spec.availability_set,
                            event_ids=[event.id],
                            approved_by=spec.called,
                        )
                        peer.hurried.set()

    async def _tell(self, peer: _Peer) -> None:
        """Tell a host what has been acknowledged here; what it does not understand it will not understand later."""
        for event_id, request in list(peer.approvals.items()):
            try:
                await self._stub(peer).ApproveEvents(request, timeout=_ASK_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
                _LOG.warning("a host of an earlier release takes no approvals", host=peer.host.uri)
            peer.approvals.pop(event_id, None)

    async def _keep(self, peer: _Peer) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ASK_S):
                    await peer.hurried.wait()
            peer.hurried.clear()
            await self._ask(peer)

    async def _ask(self, peer: _Peer) -> None:
        sets = sorted({spec.availability_set for spec in self._residents() if spec.availability_set})
        if not sets:
            peer.boards = ()
            return
        try:
            await self._tell(peer)
            request = events_pb2.ListBoardsRequest(availability_sets=sets[:_MAX_SETS])
            answer = await self._stub(peer).ListBoards(request, timeout=_ASK_S)
        except (grpc.aio.AioRpcError, VmferryError) as error:
            if not peer.silent:
                _LOG.warning("a host does not tell of its events", host=peer.host.uri, detail=str(error))
            peer.silent = True
            return
        peer.silent, peer.heard_at = False, time.monotonic()
        peer.boards = [
            found for one in answer.boards[:_MAX_BOARDS] if (found := _read(one, peer)) is not None
        ]
        listed = {event.id for one in peer.boards for event in one.board.events}
        for event_id in peer.approvals.keys() - listed:  # it is over
            del peer.approvals[event_id]

    def _stub(self, peer: _Peer) -> events_pb2_grpc.EventsServiceAsyncStub:
        proof = self._material.get()
        if peer.channel is None or peer.proof is not proof:
            # A channel proves for life who opened it; the one before ends with its last call.
            peer.channel, peer.proof = open_channel(peer.address, peer.host, proof), proof
        return events_pb2_grpc.EventsServiceStub(peer.channel)


class EventsService(events_pb2_grpc.EventsServiceServicer):
    """What this host tells others."""

    def __init__(self, residents: Callable[[], Sequence[MachineSpec]], announcements: Announcements) -> None:
        self._residents = residents
        self._announcements = announcements

    def register(self, server: grpc.aio.Server) -> str:
        """Add the methods to a server; returns the service's full name."""
        events_pb2_grpc.add_EventsServiceServicer_to_server(self, server)
        return events_pb2.DESCRIPTOR.services_by_name["EventsService"].full_name

    async def ListBoards(  # noqa: N802 - named by the contract
        self,
        request: events_pb2.ListBoardsRequest,
        context: grpc.aio.ServicerContext[object, object],  # noqa: ARG002 - gRPC's
    ) -> events_pb2.ListBoardsResponse:
        """Return boards of machines of some sets."""
        if len(request.availability_sets) > _MAX_SETS:
            raise InvalidArgumentError(f"more than {_MAX_SETS} sets", field="availability_sets")
        wanted = frozenset(request.availability_sets) - {""}
        return events_pb2.ListBoardsResponse(
            boards=[
                events_pb2.MachineBoard(
                    machine_id=spec.uuid,
                    availability_set=spec.availability_set,
                    board=records.to_text(self._announcements.board(spec.uuid)).encode(),
                )
                for spec in self._residents()
                if spec.availability_set in wanted
            ]
        )

    async def ApproveEvents(  # noqa: N802 - named by the contract
        self,
        request: events_pb2.ApproveEventsRequest,
        context: grpc.aio.ServicerContext[object, object],  # noqa: ARG002 - gRPC's
    ) -> events_pb2.ApproveEventsResponse:
        """Approve events of machines that are here."""
        if not request.availability_set:
            raise InvalidArgumentError("a set is required", field="availability_set")
        if not 0 < len(request.approved_by) <= _MAX_NAME_CHARS:
            raise InvalidArgumentError("who approved it is required, and no essay", field="approved_by")
        if len(request.event_ids) > _MAX_SETS:
            raise InvalidArgumentError(f"more than {_MAX_SETS} events", field="event_ids")
        self._announcements.approve_for(request.availability_set, request.event_ids, request.approved_by)
        return events_pb2.ApproveEventsResponse()


def _parsed(text: str, own: Identity) -> _Peer:
    match = _PEER.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not spiffe://DOMAIN/vmhost/NAME=HOST:PORT", field="event_peers")
    host = Identity.parse(match["host"], field="event_peers")
    if host == own:
        raise ConfigError("event_peers names this host itself", field="event_peers")
    return _Peer(host, match["address"])


def _read(one: events_pb2.MachineBoard, peer: _Peer) -> Distant | None:
    try:
        if len(one.board) > records.MAX_BYTES:
            raise ValueError(f"{len(one.board)} bytes are too many")  # noqa: TRY301 - as what cannot be read
        return Distant(one.machine_id, one.availability_set, records.from_text(one.board.decode()))
    except ValueError as error:
        _LOG.warning("a board of another host makes no sense", host=peer.host.uri, detail=str(error))
        return None
