"""Updating machines in place, as an operator's or a scheduler's program calls it.

Promise: asking changes nothing; however often the answer is lost, one ``request_id`` starts at most one update for as
long as the service of that host runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import grpc.aio

from vmferry.client.connection import Connection
from vmferry.client.draining import new_request_id
from vmferry.client.watching import AWAY
from vmferry.errors import PeerUnreachableError, TimedOutError
from vmferry.v1 import update_pb2 as pb
from vmferry.v1.update_pb2_grpc import UpdateServiceStub

_TRIES: Final = 120
_RETRY_S: Final = 0.5


@dataclass(frozen=True)
class Wanted:
    """What the machine is to be, and how long it may take."""

    machine: str
    target: pb.UpdateTarget
    max_pause_s: float | None = None
    notice_s: float | None = None


class UpdateCalls(Connection):
    """The calls about updates in place."""

    async def check_update(self, wanted: Wanted) -> pb.CheckUpdateResponse:
        """What stands in the way; changes nothing."""
        request = pb.CheckUpdateRequest(machine=wanted.machine, target=wanted.target)
        return await self.ask(lambda: self.call(UpdateServiceStub(self.channel).CheckUpdate, request))

    async def update_in_place(
        self,
        wanted: Wanted,
        *,
        request_id: str = "",
    ) -> pb.Update:
        """Start an update and wait for its end; a lost connection is taken up again.

        Args:
            wanted: what is to be done.
            request_id: of an earlier call whose answer was lost, or of one's own choice (a UUID).

        Raises:
            VmferryError: it was not started, or (PeerUnreachableError) that is not known.
        """
        request = pb.UpdateInPlaceRequest(
            machine=wanted.machine, request_id=request_id or new_request_id(), target=wanted.target
        )
        if wanted.max_pause_s is not None:
            request.max_pause.FromNanoseconds(int(wanted.max_pause_s * 1e9))
        if wanted.notice_s is not None:
            request.notice.FromNanoseconds(int(wanted.notice_s * 1e9))
        begun = await self.ask(lambda: self.call(UpdateServiceStub(self.channel).UpdateInPlace, request))
        for _ in range(_TRIES):
            try:
                return await self._followed(begun.update)
            except (*AWAY, TimedOutError):
                await asyncio.sleep(_RETRY_S)
        raise PeerUnreachableError(
            f"the source does not answer; the update {begun.update.id} may have gone on"
        )

    async def _followed(self, found: pb.Update) -> pb.Update:
        self.connect_anew()
        try:
            async for answer in UpdateServiceStub(self.channel).WatchUpdate(
                pb.WatchUpdateRequest(id=found.id)
            ):
                found = answer.update
        except grpc.aio.AioRpcError as error:
            raise self.explain(error, self.host) from error
        if found.phase != pb.UPDATE_PHASE_ENDED:
            raise PeerUnreachableError("the source ended the answer before the update had ended")
        return found
