"""Predictions of this host's migrations: measured for a plan or while a destination prepares, kept, and judged.

Promise: one measurement at a time, so that none disturbs another; a machine is looked at only while no migration of
it copies, and whoever begins to copy first waits until nothing is armed (:meth:`Forecasts.make_way`); no migration
fails, or waits for more than that, because of its prediction.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from google.protobuf.duration_pb2 import Duration

from source_svc import guest_rate, link_rate
from source_svc.guest_rate import GuestRate
from source_svc.link_rate import Holding, LinkRate
from source_svc.peer import Destination
from vmferry.errors import MachineBusyError, VmferryError
from vmferry.machines.host import usable_cpus
from vmferry.machines.qmp import QmpMachine
from vmferry.memory.probe import TrackerFinding
from vmferry.negotiation.encodings import ENCODINGS
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.metrics import record_prediction_error
from vmferry.telemetry.tracing import phase, span_attributes
from vmferry.together import together
from vmferry.transfer.compression import Situation, expected_rate, methods
from vmferry.transfer.convergence import Limits
from vmferry.transfer.prediction import (
    DEFAULT_COSTS,
    Circumstances,
    Figure,
    Observed,
    Prediction,
    learn,
    predict,
    relative_error,
)
from vmferry.v1 import compatibility_pb2
from vmferry.v1 import migration_pb2 as pb

_LOG: Final = get_logger(__name__)
_FRESH_S: Final = 600.0
"""A plan's prediction serves a migration that begins so much later."""
_KEPT: Final = 256
"""Predictions of plans that are remembered."""
_LEARNT_FROM: Final = 10
"""Ended migrations that the fixed costs are learnt from."""
_Key: TypeAlias = tuple[str, str, str, int, str]


@dataclass(frozen=True)
class Subject:
    """What is to be predicted: one machine's migration to one destination."""

    machine: QmpMachine
    destination: Destination
    lanes: int
    chunk_bytes: int
    limits: Limits
    compare_all: bool
    compression: str

    @property
    def key(self) -> _Key:
        """What a measurement is good for: this machine, this way to this destination, these lanes and encodings."""
        machine, host = self.machine.spec.uuid, self.destination.expected.uri
        return machine, host, self.destination.address, self.lanes, self.compression


@dataclass(frozen=True)
class Forecast:
    """A prediction as callers get it, or why there is none."""

    message: compatibility_pb2.Prediction | None = None
    why_not: str = ""

    @property
    def total_s(self) -> float:
        """Expected length of the migration; 0 if that is not known."""
        return self.message.total.expected.ToNanoseconds() / 1e9 if self.message is not None else 0.0


@dataclass
class Measurement:
    """What was measured of one subject so far."""

    guest: GuestRate
    link: LinkRate

    def circumstances(self, subject: Subject) -> Circumstances | None:
        """What follows from it; ``None`` if it is too little."""
        curve, holding, rates = self.guest.curve, self.link.holding, self.link.rates
        if curve is None or holding is None or not rates:
            return None
        send = Figure.of([_of_pages(rate, holding, subject) for rate in rates])
        return Circumstances(
            memory_bytes=subject.machine.spec.memory_bytes,
            resident_bytes=holding.resident_bytes,
            blank_bytes=holding.blank_bytes,
            dirty=curve,
            send=send,
            read=holding.read_bytes_per_s,
            # A destination that could not say takes memory when pages are written, which is in the other rate.
            reserve=Figure.of(self.link.reserve_rates or [float("inf")]),
            send_error=send.expected * relative_error(rates),
            sampled_s=self.guest.seconds,
            link_bytes_per_s=Figure.of(rates).expected,
        )


@dataclass
class Forecasts:
    """All predictions of a source service."""

    trackers: Sequence[TrackerFinding]
    _measuring: asyncio.Lock = field(default_factory=asyncio.Lock)
    _looks: dict[str, GuestRate] = field(default_factory=dict)
    _plans: dict[_Key, tuple[float, Circumstances]] = field(default_factory=dict)
    _seen: dict[str, deque[Observed]] = field(default_factory=dict)

    async def of_plan(self, subject: Subject, tracker: str, may_look: Callable[[], bool]) -> Forecast:
        """Measure guest and link, which takes about a second, and keep what follows for a migration.

        Args:
            subject: what is to be predicted.
            tracker: kind of the tracker that the migration would use.
            may_look: asked right before the guest is looked at.
        """
        machine_id = subject.machine.spec.uuid
        measured = self._measurement(subject, tracker)
        try:
            async with self._measuring, phase("measure"):
                if not may_look():
                    raise MachineBusyError("a migration of it goes on")
                await self._look(machine_id, measured.guest, guest_rate.THOROUGH)
                if not may_look():
                    raise MachineBusyError("a migration of it has begun")
                await measured.link.measure(link_rate.THOROUGH)
        except VmferryError as error:
            return Forecast(why_not=error.message)
        found = measured.circumstances(subject)
        if found is None:
            return Forecast(why_not="too little could be measured in the time there was")
        self._keep(subject, found)
        return self._forecast(subject, found)

    def _keep(self, subject: Subject, found: Circumstances) -> None:
        self._plans.pop(subject.key, None)
        self._plans[subject.key] = (time.monotonic(), found)
        while len(self._plans) > _KEPT:
            del self._plans[next(iter(self._plans))]

    def planned(self, subject: Subject) -> Forecast:
        """What follows from the measurements of the newest plan of the same migration, if they are fresh."""
        planned_at, found = self._plans.get(subject.key, (0.0, None))
        if found is None or time.monotonic() - planned_at > _FRESH_S:
            return Forecast(why_not="there is no fresh plan")
        return self._forecast(subject, found)

    def _forecast(self, subject: Subject, found: Circumstances) -> Forecast:
        kind = subject.machine.spec.kind
        costs = learn(DEFAULT_COSTS[kind], self._seen.get(kind, ()))
        predicted = predict(found, costs, subject.limits, compare_all=subject.compare_all)
        return Forecast(_to_message(found, predicted))

    @contextlib.asynccontextmanager
    async def meanwhile(self, subject: Subject, tracker: str, migration: pb.Migration) -> AsyncIterator[None]:
        """Predict a migration while something else is waited for, unless a plan has done so.

        What was not measured when that is over is left; afterwards nothing of the machine is armed. Without a tracker
        memory travels in the hypervisor's own stream, which is not predicted.
        """
        if not tracker:
            yield
            return
        forecast = self.planned(subject)
        measured = self._measurement(subject, tracker)
        # A burst to measure the link would go beyond what the caller wants to see on it.
        silent = forecast.message is not None or subject.limits.precopy_bytes_per_s is not None
        task = None if silent else asyncio.create_task(self._hurry(subject, measured))
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await self.make_way(subject.machine.spec.uuid)
        found = None if task is None else measured.circumstances(subject)
        message = self._forecast(subject, found).message if found else forecast.message
        if message is not None:
            migration.prediction.CopyFrom(message)
            span_attributes(
                predicted_total_ms=message.total.expected.ToNanoseconds() / 1e6,
                predicted_downtime_ms=message.downtime.expected.ToNanoseconds() / 1e6,
            )

    async def _hurry(self, subject: Subject, measured: Measurement) -> None:
        try:
            async with self._measuring:
                look = self._look(subject.machine.spec.uuid, measured.guest, guest_rate.QUICK)
                await together(look, measured.link.measure(link_rate.QUICK))
        except VmferryError as error:
            _LOG.info("not all was measured", machine=subject.machine.spec.name, detail=error.message)

    async def make_way(self, machine_id: str) -> None:
        """Return when nobody looks at a machine any more; called before its memory is copied."""
        look = self._looks.get(machine_id)
        if look is not None:
            await look.stop()

    def judge(self, subject: Subject, migration: pb.Migration, last_round_bytes: int) -> None:
        """A migration completed: note how far off its prediction was, and learn what its fixed parts took."""
        kind = subject.machine.spec.kind
        took = {timing.phase: timing.elapsed.ToNanoseconds() / 1e9 for timing in migration.timings}
        downtime_s = migration.downtime.ToNanoseconds() / 1e9
        if migration.HasField("prediction"):
            predicted = migration.prediction
            record_prediction_error(
                kind=kind,
                total=migration.total.ToNanoseconds() / predicted.total.expected.ToNanoseconds(),
                downtime=migration.downtime.ToNanoseconds() / predicted.downtime.expected.ToNanoseconds(),
            )
        if subject.compare_all:
            return  # its pause was of another kind
        sending_s = last_round_bytes / max(migration.progress.bytes_per_second, 1.0)
        seen = Observed(
            start_s=took.get(pb.MIGRATION_PHASE_NEGOTIATING, 0.0)
            + took.get(pb.MIGRATION_PHASE_RESERVING, 0.0),
            # A rate that was measured on a handful of pages says little about the last ones.
            pause_s=max(downtime_s - sending_s, downtime_s / 2),
            finish_s=took.get(pb.MIGRATION_PHASE_RELEASING, 0.0),
        )
        self._seen.setdefault(kind, deque(maxlen=_LEARNT_FROM)).append(seen)

    def _measurement(self, subject: Subject, tracker: str) -> Measurement:
        machine = subject.machine
        return Measurement(
            GuestRate(machine, tracker, self.trackers),
            LinkRate(subject.destination, machine.ram, subject.lanes, subject.chunk_bytes),
        )

    async def _look(self, machine_id: str, guest: GuestRate, windows: Sequence[guest_rate.Window]) -> None:
        self._looks[machine_id] = guest
        try:
            await guest.look(windows)
        finally:
            if not guest.armed:
                del self._looks[machine_id]


def _of_pages(link_bytes_per_s: float, holding: Holding, subject: Subject) -> float:
    """How fast pages would arrive, compressed as far as that pays, over a link that carries so much."""
    situation = Situation(link_bytes_per_s, link_rate.READERS, usable_cpus() * holding.experience.share)
    return expected_rate(methods(ENCODINGS, subject.compression), holding.experience, situation)


def _to_message(found: Circumstances, predicted: Prediction) -> compatibility_pb2.Prediction:
    return compatibility_pb2.Prediction(
        total=_time(predicted.total),
        downtime=_time(predicted.downtime),
        converges=predicted.converges,
        rounds=predicted.rounds,
        dirty_bytes_per_second=found.dirty.rate,
        dirty_error_bytes_per_second=found.dirty.rate * found.dirty.error,
        link_bytes_per_second=found.link_bytes_per_s,
        link_error_bytes_per_second=found.send_error / found.send.expected * found.link_bytes_per_s,
        reserve_bytes_per_second=found.reserve.expected if found.reserve.expected < float("inf") else 0.0,
        resident_bytes=found.resident_bytes,
        sampled=_duration(found.sampled_s),
    )


def _time(figure: Figure) -> compatibility_pb2.PredictedTime:
    return compatibility_pb2.PredictedTime(
        expected=_duration(figure.expected), low=_duration(figure.low), high=_duration(figure.high)
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
