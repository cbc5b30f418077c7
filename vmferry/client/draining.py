"""Emptying a host, as an operator's or a scheduler's program calls it.

Promise: a host is drained for the machines that are on it when that is asked for, to the hosts that are named; the
warrant for it is signed here, with the key in the TLS directory, and never leaves the host that it is for.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from typing import Final

from vmferry.client.connection import Connection
from vmferry.client.places import Target
from vmferry.client.watching import PATIENCE, Patience, Watched, watch
from vmferry.security.identity import Identity
from vmferry.security.tickets import TicketSigner
from vmferry.security.warrants import MAX_WARRANT_S, Allowance, issue_warrant
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

_MIB: Final = 1024 * 1024


def new_request_id() -> str:
    """What names a request that has not been made before."""
    return str(uuid.uuid4())


class DrainCalls(Connection):
    """The calls about a drain."""

    async def list_machines(self) -> list[machine_pb2.Machine]:
        """All machines on the host."""
        found: list[machine_pb2.Machine] = []
        request = pb.ListMachinesRequest()
        while True:
            answer = await self.ask(lambda: self.call(self.stub.ListMachines, request))
            found.extend(answer.machines)
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    async def drain(
        self,
        to: Sequence[Target],
        *,
        options: pb.MigrationOptions | None = None,
        request_id: str = "",
        valid_s: int = MAX_WARRANT_S,
        machines: Collection[str] | None = None,
    ) -> dp.Drain:
        """Have the host take no newcomers and move its machines to these hosts; asked twice it goes on as asked last.

        Args:
            to: hosts that machines may go to.
            options: for each migration, what to do differently from the service's configuration.
            request_id: of an earlier call whose answer was lost, or of one's own choice (a UUID).
            valid_s: how long machines may be moved by what is signed now.
            machines: the only ones that may be moved, by UUID; None: all that are there now.
        """
        request = dp.DrainHostRequest(
            request_id=request_id or new_request_id(),
            destinations=[target.message() for target in to],
            warrant=await self.warrant(to, valid_s=valid_s, only=machines),
            options=options,
        )
        return (await self.ask(lambda: self.call(self.drain_stub.DrainHost, request))).drain

    async def warrant(
        self,
        to: Sequence[Target],
        *,
        valid_s: int = MAX_WARRANT_S,
        only: Collection[str] | None = None,
    ) -> bytes:
        """What lets the host move the machines that are on it now to these hosts, signed with the own key."""
        machines = {
            machine.uuid: Allowance(machine.spec.memory_mib * _MIB, machine.spec.vcpus)
            for machine in await self.list_machines()
            if machine.HasField("spec") and (only is None or machine.uuid in only)
        }
        return issue_warrant(
            TicketSigner.load(self.tls_dir),
            source=self.host,
            destinations=[Identity.parse(target.host) for target in to],
            machines=machines,
            valid_s=valid_s,
        )

    async def undrain(self) -> dp.Drain:
        """Have the host take newcomers again; what is under way ends as it will."""
        return (await self.ask(lambda: self.call(self.drain_stub.UndrainHost, dp.UndrainHostRequest()))).drain

    async def get_drain(self) -> dp.Drain:
        """How the host's drain stands, or stood."""
        return (await self.ask(lambda: self.call(self.drain_stub.GetDrain, dp.GetDrainRequest()))).drain

    async def watch_drain(
        self, *, patience: Patience = PATIENCE, on_lost: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[dp.Drain, None]:
        """How the drain stands, now and after each change, until nothing is under way and nothing will be begun."""

        async def states(_last: dp.Drain | None) -> AsyncGenerator[dp.Drain, None]:
            self.connect_anew()
            async for answer in self.drain_stub.WatchDrain(dp.WatchDrainRequest()):
                yield answer.drain

        watched = Watched(
            open=states,
            ended=drain_is_over,
            unknown=lambda _: False,
            translate=lambda error: self.explain(error, self.host),
            resume="When the source answers again: vmferry drain-status",
        )
        seen = watch(watched, patience=patience, on_lost=on_lost)
        async with contextlib.aclosing(seen):
            async for drain in seen:
                yield drain


def drain_is_over(drain: dp.Drain) -> bool:
    """Whether nothing more will be begun and nothing is under way."""
    moving = any(item.state == dp.DRAINED_MACHINE_STATE_MOVING for item in drain.machines)
    return drain.state == dp.DRAIN_STATE_DRAINED or (drain.state == dp.DRAIN_STATE_NONE and not moving)
