"""The call of ``ClockService``: what became of the clock of a guest that has arrived.

Promise: only the source of the attempt is told, as by every other question about one; asking changes nothing, and
waits no longer than looking after the clock takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import grpc

from dest_svc.arrival import Arrival
from vmferry.handoff.states import Attempt
from vmferry.machines.clock import tell
from vmferry.v1 import clock_pb2 as pb
from vmferry.v1 import clock_pb2_grpc, handoff_pb2

Context = grpc.aio.ServicerContext[object, object]


class Checked(Protocol):
    """What makes an attempt of a reference, if the caller may ask about it."""

    def __call__(self, ref: handoff_pb2.AttemptRef, *, read_only: bool) -> Attempt:
        """The attempt."""


class ClockService(clock_pb2_grpc.ClockServiceServicer):
    """Tells sources about the clocks of the guests that they sent."""

    def __init__(self, arrivals: Mapping[str, Arrival], attempt_of: Checked) -> None:
        self._arrivals = arrivals
        self._attempt_of = attempt_of

    def register(self, server: grpc.aio.Server) -> str:
        """Add the method to a server; returns the service's full name."""
        clock_pb2_grpc.add_ClockServiceServicer_to_server(self, server)
        return pb.DESCRIPTOR.services_by_name["ClockService"].full_name

    async def GetClock(  # noqa: N802 - named by the contract
        self,
        request: pb.GetClockRequest,
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> pb.GetClockResponse:
        """Wait until the clock was looked after."""
        attempt = self._attempt_of(request.attempt, read_only=True)
        arrival = self._arrivals.get(attempt.machine_id)
        found = None if arrival is None else await arrival.clock_of(attempt)
        response = pb.GetClockResponse()
        if found is not None:
            tell(found, response.clock)
        return response
