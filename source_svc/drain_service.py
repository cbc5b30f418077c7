"""The calls of ``DrainService``: what a host is told about being emptied.

Promise: an answer stands for what is on disk. Whatever is asked for twice comes to the same as once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final

import grpc

from source_svc.drain_figures import observe_drain
from source_svc.draining import Draining
from source_svc.drainstate import DrainBook
from source_svc.inside import Inside
from source_svc.orders import read_destination, read_order
from vmferry.errors import InvalidArgumentError, TicketInvalidError, VmferryError
from vmferry.rpc.daemon import Host
from vmferry.rpc.interceptors import current_caller
from vmferry.security.warrants import VerifiedWarrant, open_warrant
from vmferry.telemetry.logs import get_logger
from vmferry.together import to_the_end
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import drain_pb2_grpc

_LOG: Final = get_logger(__name__)
_SOME_MEMORY_BYTES: Final = 1 << 30

Context = grpc.aio.ServicerContext[object, object]


class DrainService(drain_pb2_grpc.DrainServiceServicer):
    """Empties this host, and undoes that."""

    def __init__(self, host: Host, inside: Inside) -> None:
        self._host = host
        self._book = DrainBook(host.config, host.own)
        self._draining = Draining(host, inside, self._book)
        self._one_at_a_time = asyncio.Lock()
        self._end_measuring = observe_drain(self._book.snapshot)

    def register(self, server: grpc.aio.Server) -> str:
        """Add the methods to a server; returns the service's full name."""
        drain_pb2_grpc.add_DrainServiceServicer_to_server(self, server)
        return dp.DESCRIPTOR.services_by_name["DrainService"].full_name

    def resume(self) -> None:
        """Go on with what is on disk; called once, when migrations can be started."""
        if self._book.damaged is None:
            self._draining.resume()

    async def stop(self) -> None:
        """Begin nothing more; the next start goes on."""
        self._end_measuring()
        await self._draining.stop()

    async def DrainHost(  # noqa: N802 - named by the contract
        self,
        request: dp.DrainHostRequest,
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> dp.DrainHostResponse:
        """Take no newcomers, and move every machine away."""
        _check_request_id(request.request_id)
        await to_the_end(self._drain(request))
        return dp.DrainHostResponse(drain=self._book.snapshot())

    async def UndrainHost(  # noqa: N802 - named by the contract
        self,
        request: dp.UndrainHostRequest,  # noqa: ARG002 - it says nothing
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> dp.UndrainHostResponse:
        """Take newcomers again, and begin nothing more."""
        await to_the_end(self._undrain())
        return dp.UndrainHostResponse(drain=self._book.snapshot())

    async def _drain(self, request: dp.DrainHostRequest) -> None:
        async with self._one_at_a_time:
            if self._book.knows(request.request_id):
                return
            warrant = self._read(request)
            afresh = not self._book.record.draining
            await self._book.begin(request, warrant, current_caller())
            _LOG.warning(
                "this host is being emptied",
                caller=current_caller().uri,
                destinations=[one.host for one in request.destinations],
            )
            self._draining.renew(afresh=afresh)

    async def _undrain(self) -> None:
        async with self._one_at_a_time:
            if not self._book.record.draining:
                return
            # First, so that what it is about to say of the drain is not said behind this.
            await self._draining.halt()
            try:
                await self._book.undo(current_caller())
            except VmferryError:
                if self._book.damaged is None:
                    self._draining.go_on()
                raise
            _LOG.warning("this host is not being emptied any more", caller=current_caller().uri)
            await self._draining.take_back()

    async def GetDrain(  # noqa: N802 - named by the contract
        self,
        request: dp.GetDrainRequest,  # noqa: ARG002 - it says nothing
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> dp.GetDrainResponse:
        """Say how it stands."""
        return dp.GetDrainResponse(drain=self._book.snapshot())

    async def WatchDrain(  # noqa: N802 - named by the contract
        self,
        request: dp.WatchDrainRequest,  # noqa: ARG002 - it says nothing
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> AsyncIterator[dp.WatchDrainResponse]:
        """Say how it stands, now and after each change."""
        async for drain in self._book.watch():
            yield dp.WatchDrainResponse(drain=drain)

    def _read(self, request: dp.DrainHostRequest) -> VerifiedWarrant:
        """The warrant of a request that asks for something possible."""
        if not request.destinations:
            raise InvalidArgumentError("at least one destination is required", field="destinations")
        hosts = [read_destination(one, self._host.own)[0] for one in request.destinations]
        if len(set(hosts)) != len(hosts):
            raise InvalidArgumentError("a destination is named twice", field="destinations")
        read_order(request.options, self._host, _SOME_MEMORY_BYTES)
        ca_pem = self._host.tls.load().ca_pem
        warrant = open_warrant(request.warrant, ca_pem=ca_pem, now=datetime.now(UTC))
        if warrant.source != self._host.own:
            raise TicketInvalidError(
                f"the warrant is for {warrant.source}, this is {self._host.own}", field="warrant"
            )
        for host in hosts:
            if host.uri not in warrant.destinations:
                raise TicketInvalidError(f"the warrant does not name {host}", field="destinations")
        return warrant


def _check_request_id(request_id: str) -> None:
    try:
        uuid.UUID(request_id)
    except ValueError:
        raise InvalidArgumentError("request_id must be a UUID", field="request_id") from None
