"""The switch: from the guest's pause until the destination is ready with all that it was.

Promise: the guest is paused once, for the last round, the device state and the seal; what takes longer than its limit
fails by the limit's name, and the caller gives the machine back. Nothing here gives up the right to run.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from source_svc.copying import Copy
from source_svc.departure import Departure
from source_svc.device_state import check_device_state, save_device_state
from source_svc.link import until_reached
from source_svc.noticing import Notice
from source_svc.peer import Destination
from source_svc.readiness import UNEXPECTED
from source_svc.streaming import StreamedCopy
from source_svc.terms import Terms, time_limit
from vmferry.errors import WrongPhaseError
from vmferry.failpoints import reach
from vmferry.handoff import source
from vmferry.handoff.states import Attempt, AttemptState
from vmferry.machines.clock import told_ns
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import QEMU, MachineSpec
from vmferry.telemetry.tracing import phase
from vmferry.together import together
from vmferry.transfer.seal import seal_digest

# Comparing all memory byte for byte while the guest is paused takes as long as sending it again.
_SLOWEST_COMPARISON_BYTES_PER_S = 20e6


class Switch:
    """One migration's switch."""

    def __init__(
        self,
        attempt: Attempt,
        copy: Copy | StreamedCopy,
        departure: Departure,
        destination: Destination,
        machine: QmpMachine,
        terms: Terms,
        notice: Notice,
        *,
        compare_bytes: bool,
        switch_timeout_s: float,
    ) -> None:
        self.paused_at = 0.0
        """A moment before the pause; 0 if the guest was not paused."""
        self._attempt = attempt
        self._copy = copy
        self._departure = departure
        self._destination = destination
        self._machine = machine
        self._terms = terms
        self._notice = notice
        self._compare_bytes = compare_bytes
        self._switch_timeout_s = switch_timeout_s
        self._guest_clock_ns = 0

    async def to_ready(self) -> source.Heard:
        """Pause the guest and bring the destination to READY."""
        limit_s = self._switch_timeout_s
        if self._compare_bytes:
            limit_s += self._machine.spec.memory_bytes / _SLOWEST_COMPARISON_BYTES_PER_S
        if isinstance(self._copy, StreamedCopy):  # which may send a good part of memory in the pause
            limit_s += self._terms.limits.longest_downtime_s
        limit_s += self._copy.last_round_s * UNEXPECTED
        async with time_limit("switch_timeout", limit_s):
            self._notice.started()
            async with phase("pause"):
                self.paused_at = await self._copy.pause()
            reach("source.paused")
            if isinstance(self._copy, StreamedCopy):
                await self._copy.rest()
                device_state = b""  # it has gone with memory
            else:
                device_state = await self._rest(self._copy)
            async with phase("seal"):
                return await self._seal(device_state, limit_s)

    async def _rest(self, copy: Copy) -> bytes:
        """Send what is left of the paused guest; returns its device state."""
        all_come = asyncio.Event()
        if self._machine.spec.kind != QEMU:
            all_come.set()
        device_state: bytes
        _, device_state = await together(
            self._last_round(copy, all_come), self._saved_and_sent(copy, all_come)
        )
        if self._compare_bytes:
            async with phase("compare"):
                await copy.compare_all()
        return device_state

    async def _last_round(self, copy: Copy, all_come: asyncio.Event) -> None:
        # QEMU's devices may still write while they are being saved, and have been once it has hung up. To look for
        # what was written costs more than to send it, so that is done once. That QEMU says so, and whether what it
        # sent is whole, is looked at meanwhile.
        await all_come.wait()
        await copy.last_round()

    async def _saved_and_sent(self, copy: Copy, all_come: asyncio.Event) -> bytes:
        device_state = await save_device_state(self._machine, all_come=all_come.set)
        self._guest_clock_ns = await told_ns(self._machine)
        await copy.send_device_state(device_state)
        return device_state

    async def _seal(self, device_state: bytes, timeout_s: float) -> source.Heard:
        # The destination loads the device state as soon as the lanes have ended.
        ending = asyncio.create_task(self._copy.finish())
        try:
            return await self._sealed(ending, device_state, timeout_s)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _sealed(
        self, ending: asyncio.Task[None], device_state: bytes, timeout_s: float
    ) -> source.Heard:
        attempt, rounds, spec = self._attempt, self._copy.round_number, self._machine.spec
        await asyncio.sleep(0)  # the ends of the lanes go first: the destination waits for them
        digest = seal_digest(
            attempt,
            memory_root=await self._copy.root(),
            device_state=device_state,
            spec_digest=spec.digest(),
        )
        events = self._notice.hand_on()
        await self._departure.apply(source.Paused(digest))
        seal = until_reached(
            lambda: self._destination.seal(
                attempt,
                digest,
                rounds=rounds,
                events=events,
                timeout_s=timeout_s,
                guest_clock_ns=self._guest_clock_ns,
            ),
            "Seal",
            timeout_s,
        )
        # The destination waits for the end of its lanes before it answers: one round trip less in the pause. While it
        # loads, there is time to look at what it was sent.
        heard: source.Heard
        heard, *_ = await together(
            seal, self._departure.settle_records(), _ended(ending), _checked(device_state, spec)
        )
        if heard.state is not AttemptState.PREPARED or heard.digest != digest:
            raise WrongPhaseError(
                f"the destination is {heard.state.name.lower()}, not ready with what was sealed"
            )
        reach("source.ready-heard")
        return replace(heard, memory_intact=True, tail_certain=self._departure.tail_certain)


async def _ended(ending: asyncio.Task[None]) -> None:
    await ending


async def _checked(device_state: bytes, spec: MachineSpec) -> None:
    if device_state:  # else it went with memory
        await check_device_state(device_state, spec)
