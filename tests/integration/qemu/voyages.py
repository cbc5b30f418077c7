"""Migrations that are held in one of their phases, by what can be seen from outside: calls, processes, journals.

A phase is held open by a network that keeps something back, or by a hypervisor that was stopped by SIGSTOP; nothing
here waits for a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.integration.hosts import World
from tests.integration.proxy import Proxy
from tests.integration.qemu.conftest import LinuxGuest
from tests.integration.services import DEADLINE_S, Host, eventually
from vmferry.errors import VmferryError
from vmferry.handoff import source
from vmferry.handoff.rights import Standing
from vmferry.machines.process import ProcessIdentity
from vmferry.v1 import migration_pb2 as pb

SLOW = 30e3
"""Bytes a second at which the memory of the smallest guest takes seconds, and its calls do not."""


class Moment(enum.StrEnum):
    """Where a migration can be held."""

    NEGOTIATING = "negotiating"
    RESERVING = "reserving"
    PRECOPYING = "precopying"
    PAUSING = "switching, about to pause"
    SEALED = "switching, sealed"
    HANDING_OFF = "handing off"
    RELEASING = "releasing"


PHASES = {
    Moment.NEGOTIATING: pb.MIGRATION_PHASE_NEGOTIATING,
    Moment.RESERVING: pb.MIGRATION_PHASE_RESERVING,
    Moment.PRECOPYING: pb.MIGRATION_PHASE_PRECOPYING,
    Moment.PAUSING: pb.MIGRATION_PHASE_SWITCHING,
    Moment.SEALED: pb.MIGRATION_PHASE_SWITCHING,
    Moment.HANDING_OFF: pb.MIGRATION_PHASE_HANDING_OFF,
    Moment.RELEASING: pb.MIGRATION_PHASE_RELEASING,
}


@dataclass
class Voyage:
    """A migration of a guest from host a to host b."""

    world: World
    guest: LinuxGuest
    link: Proxy
    id: str = ""
    stopped: list[ProcessIdentity] = field(default_factory=list)

    async def hold(self, moment: Moment) -> None:
        """Start it, and return when it is there and stays there."""
        self.link.begin_migration()
        steps: dict[Moment, Callable[[], Awaitable[object]]] = {
            Moment.NEGOTIATING: self._negotiating,
            Moment.RESERVING: self._reserving,
            Moment.PRECOPYING: self._precopying,
            Moment.PAUSING: self._pausing,
            Moment.SEALED: self._sealed,
            Moment.HANDING_OFF: self._handing_off,
            Moment.RELEASING: self._releasing,
        }
        await steps[moment]()
        assert (await self.now()).phase == PHASES[moment]

    async def now(self) -> pb.Migration:
        """How it stands."""
        return await self.world.state(self.world.a, self.id)

    def let_go(self) -> None:
        """Whatever was held may go on."""
        self.link.let_go()
        self.wake()

    def wake(self) -> None:
        """Hypervisors that were stopped may go on."""
        while self.stopped:
            with contextlib.suppress(ProcessLookupError):
                self.stopped.pop().send_signal(signal.SIGCONT)

    def process(self, host: Host) -> ProcessIdentity:
        """The hypervisor on a host."""
        process = host.record(self.guest.id).process
        assert process is not None
        return process

    def stop_process(self, host: Host) -> None:
        """Stop the hypervisor on a host, which then answers nobody."""
        process = self.process(host)
        process.send_signal(signal.SIGSTOP)
        self.stopped.append(process)

    async def _start(self) -> None:
        self.id = await self.world.start(
            self.guest, self.world.a, self.world.b, address=self.link.address, downtime_limit=1.0
        )

    async def _negotiating(self) -> None:
        self.link.silence()
        await self._start()
        await self.world.enters(self.world.a, self.id, pb.MIGRATION_PHASE_NEGOTIATING)

    async def _reserving(self) -> None:
        await self._start()
        await self.world.enters(self.world.a, self.id, pb.MIGRATION_PHASE_RESERVING)
        # A hypervisor that is quicker than whoever looks for it must not let the migration go on.
        self.link.silence(up=False)

        def starting() -> bool:
            with contextlib.suppress(VmferryError):
                return self.world.b.machine_pid(self.guest.id) > 0
            return False

        await eventually(starting, "the destination starts its hypervisor")
        self.stop_process(self.world.b)

    async def _precopying(self) -> None:
        self.link.up_bytes_per_s = SLOW
        await self._start()
        await self.world.enters(self.world.a, self.id, pb.MIGRATION_PHASE_PRECOPYING)
        await eventually(lambda: sum(lane.up_bytes for lane in self.link.lanes) > 0, "memory is on its way")

    async def _pausing(self) -> None:
        await self._precopying()
        self.stop_process(self.world.a)
        self.link.up_bytes_per_s = None
        await self.world.enters(self.world.a, self.id, pb.MIGRATION_PHASE_SWITCHING)

    async def _sealed(self) -> None:
        await self._precopying()
        self.stop_process(self.world.b)
        self.link.up_bytes_per_s = None
        await eventually(
            lambda: isinstance(self.world.a.ledger.rights(self.guest.id).outgoing, source.Sealed),
            "the state is sealed",
        )

    async def _handing_off(self) -> None:
        await self._sealed()
        held = asyncio.Event()

        def hold() -> None:
            self.link.silence()
            held.set()

        # The destination holds back its answer to Seal, so the call that follows it is Go.
        self.link.at_call_after_next_answer(hold)
        self.wake()
        await asyncio.wait_for(held.wait(), DEADLINE_S)
        await eventually(
            lambda: self.world.a.ledger.rights(self.guest.id).standing is Standing.HANDED_OFF,
            "the right is given up",
        )

    async def _releasing(self) -> None:
        await self._handing_off()
        self.stop_process(self.world.a)
        self.link.let_go()
        await self.world.enters(self.world.a, self.id, pb.MIGRATION_PHASE_RELEASING)
