"""Copying a machine's memory while it runs: rounds, convergence, the last round.

Promise: within a round a page is sent at most once, and a round is acknowledged whole before the next one starts, so
that an older copy can never overwrite a newer one. Pages are read after they were protected, never before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from source_svc.compressing import Compression
from source_svc.decisions import hopeless, show_decision
from source_svc.link import LinkReport
from source_svc.migrations import Migration
from source_svc.peer import Destination
from source_svc.reading import PageSupply, Round
from source_svc.terms import Terms
from vmferry.errors import HashMismatchError, VmferryError
from vmferry.failpoints import reach
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.throttle import Throttle
from vmferry.memory.probe import TrackerFinding, choose_tracker
from vmferry.memory.regions import RamFile, find_mapping
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.trackers import given_up
from vmferry.telemetry.tracing import phase, span_attributes, span_event
from vmferry.together import to_the_end, together
from vmferry.transfer.compression import RAW, Method
from vmferry.transfer.convergence import (
    FIXED_DOWNTIME_S,
    NO_EFFORT,
    NOT_READY_S,
    WAITING_S,
    RoundReport,
    Verdict,
    decide,
)
from vmferry.transfer.frames import Batches, ChunkBuilder
from vmferry.transfer.lanes import Lanes, LaneSettings
from vmferry.transfer.patience import Connections
from vmferry.transfer.tables import page_table
from vmferry.transfer.traffic import Traffic
from vmferry.transfer.window import Window

_REPORT_S: Final = 0.1
_REMEMBERED_ROUNDS: Final = 1000
BROKEN_SHARE: Final = 0.25
"""A round that was without a lane for a larger part of its time is no measure of what can be sent."""


@dataclass(frozen=True)
class CopySettings:
    """What decides how memory is copied."""

    window: Window
    terms: Terms
    """What may be done to guest and link, which may change."""
    throttle: Throttle
    stall_timeout_s: float
    reconnect_timeout_s: float
    tracker: str
    """Kind of the tracker that the compatibility report chose."""
    trackers: Sequence[TrackerFinding]
    """What was found out about trackers when the service started."""
    state_dir: Path
    """Where the digests of a large machine's pages may lie."""
    methods: Sequence[Method] = (RAW,)
    """How chunks may be compressed."""
    link_bytes_per_s: float = 0.0
    """What the link was measured to carry; 0 if it was not."""


class Copy:
    """One machine's memory on its way."""

    def __init__(
        self, machine: QmpMachine, destination: Destination, migration: Migration, settings: CopySettings
    ) -> None:
        self.round_number = 0
        self.last_round_bytes = 0
        """Pages of the last round, which the guest waited for."""
        self.last_round_s = 0.0
        """What the last round was predicted to take when it was decided to switch; switch_timeout is for the rest."""
        self._machine = machine
        self._destination = destination
        self._migration = migration
        self._settings = settings
        region = machine.ram
        self._ram = RamFile.open(region.path, region.size_bytes)
        try:
            self._table = page_table(region.page_count, settings.state_dir)
            self._tracker = choose_tracker(
                find_mapping(machine.pid, region),
                self._ram,
                self._table,
                settings.tracker,
                findings=settings.trackers,
            )
        except BaseException:
            self._ram.close()
            raise
        self._gives_up = machine.spec.qemu is not None and machine.spec.qemu.balloon
        self._lanes: Lanes | None = None
        self._compression = Compression(
            settings.methods,
            readers=settings.window.lanes,
            traffic=lambda: self._lanes.traffic if self._lanes is not None else Traffic(),
            link_bytes_per_s=settings.link_bytes_per_s,
        )
        self._builders = [ChunkBuilder(self._ram, self._table) for _ in range(settings.window.lanes)]
        self._link: LinkReport | None = None
        self._started = time.monotonic()
        self._reported = 0.0
        self._supply: PageSupply | None = None
        self._first = PageRuns()

    @property
    def tracker_kind(self) -> str:
        """The tracker in use."""
        return self._tracker.kind

    async def open(self, migration_id: bytes, transfer_token: bytes) -> None:
        """Connect the lanes and start tracking writes."""
        settings = self._settings
        self._lanes = Lanes(
            LaneSettings(
                migration_id=migration_id,
                transfer_token=transfer_token,
                open_channel=self._destination.new_lane_channel,
                window=settings.window,
                stall_timeout_s=settings.stall_timeout_s,
                reconnect_timeout_s=settings.reconnect_timeout_s,
                on_event=lambda name, facts: span_event(name, **facts),
                pacer=settings.terms.pacer,
            )
        )
        self._link = LinkReport(self._lanes, self._migration)
        # Connecting is mostly waiting, and the other takes the longer the larger the machine is.
        await together(self._lanes.open(), to_the_end(asyncio.to_thread(self._begin_tracking)))
        await self._machine.get_ready()
        reach("source.tracking")

    def _begin_tracking(self) -> None:
        """From now on every write is noted; so only what holds data by now is to be read in the first round."""
        self._tracker.arm()
        self._first = self._ram.data_runs()

    async def converge(self, may_switch: Callable[[], Awaitable[bool]]) -> None:
        """Copy in rounds until the policy wants to switch and ``may_switch`` agrees.

        Raises:
            NotConvergingError: the rest will never fit the pause.
        """
        terms, throttle = self._settings.terms, self._settings.throttle
        history: list[RoundReport] = []
        effort = NO_EFFORT
        runs, self._first = self._first, PageRuns()
        while True:
            report, told = await self._round(runs)
            if not told:
                runs = await asyncio.to_thread(self._tracker.scan)
                continue
            history.append(report)
            decision = decide(history, terms.limits, effort)
            show_decision(self._migration, decision, terms.limits, report, throttle.percent)
            effort = decision.effort
            if decision.verdict is Verdict.GIVE_UP:
                raise hopeless(self.round_number, decision)
            if decision.verdict is Verdict.SWITCH:
                self.last_round_s = max(0.0, decision.expected_downtime_s - FIXED_DOWNTIME_S)
                if await may_switch():
                    return
                history.pop()  # rounds that only wait for the destination say nothing about convergence
                await asyncio.sleep(NOT_READY_S)
            if decision.waiting:
                await terms.changed_or(WAITING_S)
            del history[:-_REMEMBERED_ROUNDS]
            self._hold_back(effort.throttle_percent)
            runs = await asyncio.to_thread(self._tracker.scan)

    async def pause(self) -> float:
        """Pause the guest; returns a moment at which it certainly still ran."""
        await self._settings.throttle.end()
        self._migration.message.progress.throttle_percent = 0
        self._settings.terms.guest_pauses()
        before = time.monotonic()
        await self._machine.stop()
        return before

    def _hold_back(self, percent: int) -> None:
        """Slow the guest down by so much; raises what went wrong with that before."""
        throttle = self._settings.throttle
        before = throttle.percent
        throttle.set(percent)
        if percent != before:
            span_event("throttle", percent=percent, means=throttle.means.value)
        self._migration.message.progress.throttle_percent = percent

    async def last_round(self) -> None:
        """Send what was written until the pause; the guest is paused."""
        async with phase("last round"):
            self.round_number += 1
            runs = await asyncio.to_thread(self._rest)
            span_attributes(pages=runs.page_count)
            self.last_round_bytes = runs.page_count * PAGE_SIZE
            await self._send(runs)
            reach("source.last-round-sent")

    def _rest(self) -> PageRuns:
        """What was written since the last scan, and what the guest gave up since it was sent: that reads as zero."""
        runs = self._tracker.scan()
        return runs.union(given_up(self._ram, self._table)) if self._gives_up else runs

    async def send_device_state(self, data: bytes) -> None:
        """Send the device state."""
        await self._open_lanes.send_device_state(data)

    async def compare_all(self) -> None:
        """Send all memory again for the destination to compare, byte for byte; the guest is paused.

        Raises:
            HashMismatchError: pages differ.
        """
        await self._open_lanes.drain()  # a page of the last round may still be on its way on another lane
        pages = PageRuns.whole(self._table.page_count)
        await self._send(pages, compare_only=True)
        await self._open_lanes.drain()
        verification = self._migration.message.verification
        verification.compared_bytes = pages.page_count * PAGE_SIZE
        verification.different_pages = self._open_lanes.traffic.different_pages
        if verification.different_pages:
            raise HashMismatchError(f"{verification.different_pages} pages differ at the destination")

    async def root(self) -> bytes:
        """The digest of all memory that was sent."""
        return await asyncio.to_thread(self._table.root)

    async def finish(self) -> None:
        """End the lanes, right behind their last frames; returns when everything is in the destination's memory."""
        await self._open_lanes.finish()
        await self._open_lanes.drain()
        await self._report(force=True)

    async def close(self) -> None:
        """Let the guest run, stop tracking, close lanes and files; safe to call twice."""
        try:
            await self._settings.throttle.end()
        except VmferryError as error:  # whoever gives the machine back goes on trying
            span_event("still held back", why=error.message)
        self._migration.message.progress.throttle_percent = 0
        await asyncio.to_thread(self._tracker.disarm)
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
        self._ram.close()

    @property
    def connections(self) -> Connections:
        """How the lanes are connected now."""
        return self._open_lanes.connections

    @property
    def _open_lanes(self) -> Lanes:
        assert self._lanes is not None, "the lanes were opened"
        return self._lanes

    async def _round(self, runs: PageRuns) -> tuple[RoundReport, bool]:
        """One round; and whether it tells something: most of a long break says nothing about link or guest."""
        self.round_number += 1
        broken_s = self._open_lanes.connections.broken_s
        before = self._open_lanes.traffic.data_bytes
        started = time.monotonic()
        async with phase("round", number=self.round_number, pages=runs.page_count):
            await self._send(runs)
            await self._open_lanes.drain()
            reach("source.round-sent")
            seconds = time.monotonic() - started
            dirty = await asyncio.to_thread(self._tracker.count)
            span_attributes(dirty_pages=dirty, compression=str(self._compression.current))
        sent = self._open_lanes.traffic.data_bytes - before
        broken_s = self._open_lanes.connections.broken_s - broken_s
        report = RoundReport(self.round_number, seconds, sent, dirty * PAGE_SIZE)
        return report, broken_s < BROKEN_SHARE * seconds

    async def _send(self, runs: PageRuns, *, compare_only: bool = False) -> None:
        """Have all pages of ``runs`` read, hashed and handed over by the lanes."""
        pacer, lanes = self._settings.terms.pacer, self._open_lanes
        batches = Batches(runs, lambda: pacer.largest_frame(self._settings.window.frame_bytes) // PAGE_SIZE)
        self._compression.start()
        self._supply = supply = PageSupply(
            Round(self.round_number, batches, compare_only),
            self._builders,
            self._compression,
            lanes.traffic,
            page_count=runs.page_count,
        )
        carrying = asyncio.create_task(lanes.carry(supply))
        try:
            while not carrying.done():
                await asyncio.wait({carrying}, timeout=_REPORT_S)
                await self._report()
            await carrying
        finally:
            supply.stop()
            carrying.cancel()
            await asyncio.gather(carrying, return_exceptions=True)

    async def _report(self, *, force: bool = False) -> None:
        """Bring the resource up to date, a few times a second."""
        now = time.monotonic()
        if now - self._reported < _REPORT_S and not force:
            return
        self._reported = now
        traffic = self._open_lanes.traffic
        progress = self._migration.message.progress
        progress.round = self.round_number
        progress.memory_bytes = self._table.page_count * PAGE_SIZE
        progress.sent_bytes = traffic.data_bytes
        progress.wire_bytes = traffic.wire_bytes
        progress.zero_pages = traffic.zero_pages
        progress.remaining_bytes = (self._supply.left if self._supply else 0) * PAGE_SIZE
        if self.round_number == 1:
            progress.bytes_per_second = traffic.data_bytes / max(now - self._started, 1e-6)
            if progress.bytes_per_second > 0:
                progress.eta.FromNanoseconds(int(progress.remaining_bytes / progress.bytes_per_second * 1e9))
        await self._migration.touch()
