"""Copying a machine's memory in its hypervisor's own migration stream, carried inside our lanes.

::

    QEMU --unix socket--> pieces with their place in the stream ==lanes==> put in order --unix socket--> QEMU

Promise: no more of the stream is held than the window allows; the hypervisor never hands over by itself: it waits,
paused, until it is told to send the rest; its stream counts as whole only after it said that it has completed, from
when on it cannot resume the guest by itself. Until then nothing may be sealed. A hypervisor that cannot be trusted to
see every write streams nothing while its guest runs: the guest is paused first, for no longer than the limit allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from source_svc.carrying import CARRIERS, Carrier
from source_svc.compressing import Compression
from source_svc.copying import BROKEN_SHARE, CopySettings
from source_svc.decisions import hopeless, show_decision
from source_svc.link import LinkReport
from source_svc.migrations import Migration
from source_svc.peer import Destination
from vmferry.errors import MachineFailedError, NotConvergingError, VmferryError
from vmferry.machines.migrating import PAUSED, StreamProgress
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.stream_socket import StreamSource
from vmferry.telemetry.tracing import phase, span_attributes, span_event
from vmferry.transfer.convergence import (
    FIXED_DOWNTIME_S,
    NO_EFFORT,
    Decision,
    Effort,
    OnNoConvergence,
    RoundReport,
    Verdict,
    decide,
)
from vmferry.transfer.lanes import Lanes, LaneSettings
from vmferry.transfer.patience import Connections
from vmferry.transfer.streams import MAX_PIECE_BYTES, Rounds, Sample, StreamDigest
from vmferry.transfer.wire import PieceFrame
from vmferry.v1 import transfer_pb2

_NOT_READY_S: Final = 0.05
_POLL_S: Final = 0.01
"""The hypervisor may pause the guest by itself at any time, and then somebody must notice."""
_PAUSED_POLL_S: Final = 0.002
# QEMU learns its rate in windows of 100 ms. Before the first is over it takes an empty remainder for the end, without
# asking what the guest wrote meanwhile.
_FIRST_WINDOW_S: Final = 0.12
_WHOLE_POLL_S: Final = 0.02
_IN_FLIGHT_SHARE: Final = 0.25
"""What part of the allowed pause may go into waiting for pieces that are on their way when the guest is paused."""
_LEAST_IN_FLIGHT_BYTES: Final = 128 * 1024
"""What each lane may have on its way, however slow the link seems to be."""
_MEASURED_S: Final = 0.25
_FORGETTING: Final = 0.7
_REMEMBERED_ROUNDS: Final = 1000


class StreamedCopy:
    """One machine's memory and device state on their way, in one stream."""

    tracker_kind = ""
    """The hypervisor tracks writes itself."""

    def __init__(
        self, machine: QmpMachine, destination: Destination, migration: Migration, settings: CopySettings
    ) -> None:
        self.round_number = 0
        self.last_round_s = 0.0
        """What the last round was predicted to take when it was decided to switch; switch_timeout is for the rest."""
        self._effort = NO_EFFORT
        self._live = machine.spec.streams_live
        self._machine = machine
        self._migration = migration
        self._settings = settings
        self._new_channel = destination.new_lane_channel
        self._source = StreamSource(machine.paths.stream_socket)
        self._digest = StreamDigest()
        self._lanes: Lanes | None = None
        self._stream: Carrier | None = None
        self._link: LinkReport | None = None
        self._carrying: asyncio.Task[None] | None = None
        self._rounds: Rounds | None = None
        self._active_at = 0.0
        self._began_at = 0.0
        self._completed = False
        self._decided = False
        self._bytes_per_second = 0.0
        """Rate at which the destination's hypervisor takes the stream, while there is enough of it."""
        self._measured = (0.0, 0)

    async def open(self, migration_id: bytes, transfer_token: bytes) -> None:
        """Connect the lanes."""
        settings = self._settings
        self._lanes = lanes = Lanes(
            LaneSettings(
                migration_id=migration_id,
                transfer_token=transfer_token,
                open_channel=self._new_channel,
                window=settings.window,
                stall_timeout_s=settings.stall_timeout_s,
                reconnect_timeout_s=settings.reconnect_timeout_s,
                on_event=lambda name, facts: span_event(name, **facts),
                pacer=settings.terms.pacer,
            )
        )
        compression = Compression(
            settings.methods,
            readers=CARRIERS,
            traffic=lambda: lanes.traffic,
            link_bytes_per_s=settings.link_bytes_per_s,
        )
        self._stream = Carrier(
            self._source, lanes, self._digest, compression, self._in_flight_limit, self._piece_bytes
        )
        self._link = LinkReport(self._lanes, self._migration)
        await self._lanes.open()
        await self._machine.get_ready_to_stream(slow_down=settings.terms.limits.max_throttle_percent > 0)

    async def converge(self, may_switch: Callable[[], Awaitable[bool]]) -> None:
        """Let the stream flow until the rest fits the downtime limit and ``may_switch`` agrees.

        Raises:
            NotConvergingError: it will never fit.
        """
        # The hypervisor pauses the guest by itself when next to nothing is left, so both sides must be ready before.
        await _until(may_switch)
        if not self._live:
            return
        await self._begin()
        history: list[RoundReport] = []
        broken_s = self.connections.broken_s
        while (report := await self._round()) is not None:
            before, broken_s = broken_s, self.connections.broken_s
            if broken_s - before > BROKEN_SHARE * report.seconds:
                continue  # a break says nothing about the link or the guest
            history.append(report)
            decision = self._decide(history)
            now = self._migration.message.progress.throttle_percent
            show_decision(self._migration, decision, self._settings.terms.limits, report, now)
            if decision.verdict is Verdict.GIVE_UP:
                raise hopeless(self.round_number, decision)
            if decision.verdict is Verdict.SWITCH:
                self.last_round_s = max(0.0, decision.expected_downtime_s - FIXED_DOWNTIME_S)
                if await may_switch():
                    return
                history.pop()  # rounds that only wait for the destination say nothing about convergence
            del history[:-_REMEMBERED_ROUNDS]
            await self._hold_back(decision.effort)
        # Both sides were ready when it began, and asking again would only make the pause longer.
        span_event("paused by the hypervisor", round=self.round_number)
        await self._let_arrive()

    async def _hold_back(self, effort: Effort) -> None:
        """Let the hypervisor slow its guest down by so much; it does so only while the guest writes too fast."""
        before, self._effort = self._effort, effort
        if effort.throttle_percent != before.throttle_percent:
            span_event("throttle", percent=effort.throttle_percent)
            await self._machine.slow_down(max(effort.throttle_percent, 1))

    async def pause(self) -> float:
        """Pause the guest, unless the hypervisor has; returns a moment at which it certainly still ran."""
        if self._live:
            await self._sample()
        else:
            self._active_at = time.monotonic()
        self._settings.terms.guest_pauses()
        await self._machine.stop()
        if not self._live:
            self.round_number = 1
            await self._begin()
        return self._active_at

    async def rest(self) -> None:
        """Send what is left of the paused guest; returns when all of it is in the destination's hypervisor.

        Raises:
            NotConvergingError: that is all its memory, and takes longer than the pause may.
        """
        limit_s = self._settings.terms.limits.longest_downtime_s
        left_s = None if self._live else self._active_at + limit_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                await self._rest()
        except TimeoutError as error:
            raise NotConvergingError(
                "the guest has to be paused while all its memory is sent, as its hypervisor loses track of writes; "
                f"that was not done after {limit_s * 1e3:.0f} ms, which is the limit",
                rounds=self.round_number,
            ) from error

    async def _rest(self) -> None:
        async with phase("last round"):
            while (await self._sample()).status != PAUSED:
                await self._look_again_in(_PAUSED_POLL_S if self._live else _WHOLE_POLL_S)
        async with phase("device state"):
            before = self._digest.size_bytes
            await self._machine.finish_stream()
            assert self._carrying is not None, "the stream was begun"
            await self._carrying
            # Not before this may anything be sealed: from here on the hypervisor does not resume the guest by itself.
            await self._machine.wait_stream_completed()
            self._completed = True
            span_attributes(bytes=self._digest.size_bytes - before)
            end = PieceFrame(transfer_pb2.StreamPiece(offset=self._digest.size_bytes), b"", mark=True)
            await self._open_lanes.send(end)
            await self._open_lanes.drain()

    async def root(self) -> bytes:
        """The digest of the whole stream."""
        return self._digest.root()

    async def finish(self) -> None:
        """End the lanes; returns when the destination agrees that each was whole."""
        await self._open_lanes.finish()
        # The last question to the hypervisor was before its end, and what was on its way then was not counted.
        progress = self._migration.message.progress
        progress.sent_bytes = self._digest.size_bytes
        progress.wire_bytes = self._open_lanes.traffic.wire_bytes
        await self._migration.touch()

    async def close(self) -> None:
        """End the hypervisor's migration unless it is through, and close the lanes; safe to call twice."""
        if self._began_at and not self._completed:
            with contextlib.suppress(VmferryError):
                await self._machine.end_stream()
        if self._carrying is not None:
            self._carrying.cancel()
            await asyncio.gather(self._carrying, return_exceptions=True)
        self._source.close()
        if self._link is not None:
            await self._link.close()
        if self._lanes is not None:
            traffic = self._lanes.traffic
            span_attributes(
                wire_bytes=traffic.wire_bytes,
                reconnects=traffic.reconnects,
                repeated_bytes=traffic.repeated_bytes,
            )
            await self._lanes.close()

    @property
    def connections(self) -> Connections:
        """How the lanes are connected now."""
        return self._open_lanes.connections

    @property
    def _open_lanes(self) -> Lanes:
        assert self._lanes is not None, "the lanes were opened"
        return self._lanes

    @property
    def _carrier(self) -> Carrier:
        assert self._stream is not None, "the lanes were opened"
        return self._stream

    async def _begin(self) -> None:
        self._source.listen()
        self._began_at = time.monotonic()
        self._active_at = self._active_at or self._began_at
        self._carrying = asyncio.create_task(self._carry())
        await self._machine.begin_stream(self._machine.paths.stream_socket)
        first = Sample(self._began_at, 1, 0, self._machine.spec.memory_bytes)
        self._rounds = Rounds(lambda: self._carrier.arrived_bytes, first)
        self._measured = (self._began_at, 0)

    async def _round(self) -> RoundReport | None:
        """Follow one round to its end; ``None`` if the hypervisor has paused the guest because little was left."""
        assert self._rounds is not None, "the stream was begun"
        self.round_number = self._rounds.number
        async with phase("round", number=self.round_number):
            while True:
                progress = await self._sample()
                if progress.status == PAUSED:
                    return None
                # While it sets its migration up, the hypervisor counts no rounds yet.
                sample = Sample(
                    time.monotonic(),
                    max(progress.rounds, 1),
                    progress.transferred_bytes,
                    progress.remaining_bytes,
                )
                report = self._rounds.add(sample)
                if report is not None:
                    span_attributes(sent_bytes=report.sent_bytes, left_bytes=report.dirty_bytes)
                    return report
                await self._look_again_in(_POLL_S)

    def _decide(self, history: list[RoundReport]) -> Decision:
        """What the policy says, with the pause that is left when what is on its way already has arrived."""
        limits, arriving_s = self._settings.terms.limits, self._arriving_s()
        left = replace(
            limits,
            downtime_s=max(0.0, limits.downtime_s - arriving_s),
            max_downtime_s=max(0.0, limits.longest_downtime_s - arriving_s),
        )
        found = decide(history, left, self._effort)
        allowed_s = found.effort.downtime_s(limits)
        verdict = found.verdict
        if verdict is Verdict.SWITCH and arriving_s > allowed_s and not found.forced:
            # Nothing is left to send, but what is on its way would be waited for.
            hopeless_now = history[-1].number >= limits.max_rounds
            aborts = limits.on_no_convergence is OnNoConvergence.ABORT
            verdict = Verdict.GIVE_UP if hopeless_now and aborts else Verdict.CONTINUE
        self._decided = True
        expected_s = found.expected_downtime_s + arriving_s
        return replace(found, verdict=verdict, expected_downtime_s=expected_s, allowed_downtime_s=allowed_s)

    def _arriving_s(self) -> float:
        """How long it takes until all has arrived that the hypervisor believes to be sent."""
        on_its_way = self._carrier.under_way_bytes + self._source.waiting_bytes
        so_far = max(self._carrier.arrived_bytes, 1) / (time.monotonic() - self._began_at)
        return on_its_way / (self._bytes_per_second or so_far)

    def _measure(self, now: float) -> None:
        since, before = self._measured
        if now - since < _MEASURED_S:
            return
        arrived = self._carrier.arrived_bytes
        rate = (arrived - before) / (now - since)
        # While the hypervisor has little to send, the link is not as slow as it seems.
        self._bytes_per_second = max(rate, self._bytes_per_second * _FORGETTING)
        self._measured = (now, arrived)

    async def _let_arrive(self) -> None:
        """Wait for what was on its way when the hypervisor paused the guest, which it knows nothing about.

        Whoever said "switch now" meant whatever the pause; only a link that stands ends it then.
        """
        limit_s = self._effort.downtime_s(self._settings.terms.limits)
        left_s = limit_s - (time.monotonic() - self._active_at)
        while True:
            try:
                async with asyncio.timeout(None if self._settings.terms.limits.switch_now else left_s):
                    await self._open_lanes.drain()
                    while self._carrier.under_way_bytes or self._source.waiting_bytes:
                        await self._look_again_in(_PAUSED_POLL_S)
                        await self._open_lanes.drain()
                return
            except TimeoutError as error:
                if self._settings.terms.limits.switch_now:
                    continue
                raise NotConvergingError(
                    "what was on its way when nothing was left to send took longer than the "
                    f"{limit_s * 1e3:.0f} ms for which the guest may be paused; "
                    f"{self._bytes_per_second / 1e6:.1f} MB/s can be sent",
                    rounds=self.round_number,
                ) from error

    async def _look_again_in(self, seconds: float) -> None:
        """Wait, but not beyond the stream's end, which never comes unasked unless something failed."""
        assert self._carrying is not None, "the stream was begun"
        done, _ = await asyncio.wait({self._carrying}, timeout=seconds)
        if done:
            self._carrying.result()
            await self._machine.stream_progress()  # raises what the hypervisor says about it
            raise MachineFailedError("the hypervisor ended its stream before it was asked to")

    async def _sample(self) -> StreamProgress:
        """Ask the hypervisor, and tell whoever watches."""
        asked_at = time.monotonic()
        found = await self._machine.stream_progress()
        if self._live and found.status != PAUSED:
            self._active_at = asked_at
        traffic = self._open_lanes.traffic
        progress = self._migration.message.progress
        progress.round = self.round_number
        progress.memory_bytes = self._machine.spec.memory_bytes
        progress.sent_bytes = found.transferred_bytes
        progress.wire_bytes = traffic.wire_bytes
        progress.zero_pages = found.zero_pages
        # Until it is told to do more, it takes next to nothing, which is not worth a word.
        progress.throttle_percent = found.throttle_percent if self._effort.throttle_percent else 0
        progress.remaining_bytes = found.remaining_bytes
        self._measure(asked_at)
        if not self._decided:
            progress.bytes_per_second = self._bytes_per_second
        await self._migration.touch()
        return found

    async def _carry(self) -> None:
        """Send what the hypervisor writes until it hangs up; which by itself says nothing."""
        await self._source.accept()
        if self._live:
            await asyncio.sleep(_FIRST_WINDOW_S)
        await self._carrier.run()

    def _piece_bytes(self, limit: int) -> int:
        settings = self._settings
        piece_bytes = min(MAX_PIECE_BYTES, settings.window.frame_bytes, limit // settings.window.lanes)
        return settings.terms.pacer.largest_frame(piece_bytes)

    def _in_flight_limit(self) -> int:
        """The hypervisor takes for sent what it has written, so that on a slow link little may be on its way."""
        settings = self._settings
        if not self._live:
            return settings.window.window_bytes
        allowed = self._bytes_per_second * settings.terms.limits.downtime_s * _IN_FLIGHT_SHARE
        least = settings.terms.pacer.largest_frame(_LEAST_IN_FLIGHT_BYTES)
        return min(settings.window.window_bytes, max(int(allowed), settings.window.lanes * least))


async def _until(ready: Callable[[], Awaitable[bool]]) -> None:
    while True:
        if await ready():
            return
        await asyncio.sleep(_NOT_READY_S)
