"""What a running service measures about itself, besides what happens in its migrations.

Promise: everything is asked for when somebody exports metrics, and never otherwise, except for the timer that finds
out how late the event loop is; when the service ends nothing is asked any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Final

from vmferry.security.material import TlsFiles
from vmferry.security.renewal import CurrentMaterial
from vmferry.telemetry import instruments
from vmferry.telemetry.looplag import watch_loop
from vmferry.telemetry.metrics import observe
from vmferry.v1.migration_pb2 import MIGRATION_PHASE_QUEUED, MigrationPhase, MigrationProgress
from vmferry.web.view import View

_PHASES: Final = [name for name in MigrationPhase.keys() if not name.endswith(("_UNSPECIFIED", "_ENDED"))]  # noqa: SIM118 - no mapping
_PREFIX: Final = "MIGRATION_PHASE_"
_BY_MACHINE: Final = {
    instruments.DIRTY_RATE: lambda progress: progress.dirty_bytes_per_second,
    instruments.SEND_RATE: lambda progress: progress.bytes_per_second,
    instruments.REMAINING: lambda progress: float(progress.remaining_bytes),
    instruments.EXPECTED_DOWNTIME: lambda progress: progress.expected_downtime.ToNanoseconds() / 1e9,
}


@contextlib.asynccontextmanager
async def measured(views: Sequence[View], tls: TlsFiles) -> AsyncIterator[None]:
    """Measure meanwhile."""
    material = CurrentMaterial(tls)
    lag = asyncio.create_task(watch_loop())
    ends = [
        observe(instruments.CERTIFICATE_EXPIRY, lambda: {"": material.get().not_after.timestamp()}),
        observe(instruments.MIGRATIONS_OPEN, partial(_open_by_phase, views)),
        observe(instruments.MIGRATIONS_QUEUED, partial(_queued, views)),
        observe(instruments.ARRIVALS_OPEN, lambda: {"": sum(len(view.arrivals()) for view in views)}),
        *(observe(gauge, partial(_by_machine, views, value)) for gauge, value in _BY_MACHINE.items()),
    ]
    try:
        yield
    finally:
        for end in ends:
            end()
        lag.cancel()
        await asyncio.gather(lag, return_exceptions=True)


def _open_by_phase(views: Sequence[View]) -> Mapping[str, float]:
    """How many migrations are in each phase; every phase has its series, so that an empty one is seen to be."""
    found = Counter(MigrationPhase.Name(one.phase) for view in views for one in view.open_migrations())
    return {name.removeprefix(_PREFIX).lower(): found[name] for name in _PHASES}


def _queued(views: Sequence[View]) -> Mapping[str, float]:
    """How many wait to go to each host."""
    waiting = (one for view in views for one in view.open_migrations() if one.phase == MIGRATION_PHASE_QUEUED)
    return Counter(one.destination.host for one in waiting)


def _by_machine(views: Sequence[View], value: Callable[[MigrationProgress], float]) -> Mapping[str, float]:
    return {one.machine: value(one.progress) for view in views for one in view.open_migrations()}
