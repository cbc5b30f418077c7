"""A migration's progress as a person watches it.

Promise: a terminal shows one live picture; a pipe or a log file gets one plain line for each change of phase or
round, when the connection between the hosts is lost or back, and, in between, at most one a second; nothing is
written to stdout.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.text import Text

from vmferry.cli.output import console, label, milliseconds, say, size
from vmferry.v1.migration_pb2 import (
    MIGRATION_OUTCOME_UNSPECIFIED,
    MIGRATION_PHASE_PRECOPYING,
    Migration,
    MigrationOutcome,
    MigrationPhase,
)

_LINE_EVERY_S: Final = 1.0
_BAR_COLUMNS: Final = 60


class ProgressView(Protocol):
    """Shows a migration again and again until it is closed."""

    def show(self, migration: Migration) -> None:
        """Show where the migration stands now."""

    def note(self, text: str) -> None:
        """Say something in between, such as a lost connection."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress_view() -> ProgressView:
    """A live view for a terminal, a plain one for everything else."""
    screen = console()
    return LiveView(screen) if screen.is_terminal else LineView()


def phase_name(migration: Migration) -> str:
    """The phase of a migration in lower case."""
    return label(MigrationPhase, migration.phase, "MIGRATION_PHASE_")


def outcome_name(migration: Migration) -> str:
    """The outcome of a migration in lower case; ``open`` while there is none."""
    if migration.outcome == MIGRATION_OUTCOME_UNSPECIFIED:
        return "open"
    return label(MigrationOutcome, migration.outcome, "MIGRATION_OUTCOME_")


def headline(migration: Migration) -> str:
    """Phase and round, or how it ended."""
    if migration.outcome != MIGRATION_OUTCOME_UNSPECIFIED:
        return f"{migration.machine}: {outcome_name(migration)}"
    text = f"{migration.machine}: {phase_name(migration)}"
    return f"{text}, round {migration.progress.round}" if migration.progress.round else text


def facts(migration: Migration) -> str:
    """The figures of a migration, those that are known."""
    progress = migration.progress
    parts = []
    if migration.HasField("queue"):
        queue = migration.queue
        place = f"place {queue.position} of {queue.length}: " if queue.position else ""
        return f"{place}{queue.waits_for}"
    if progress.HasField("disconnected_since"):
        left_s = milliseconds(progress.reconnect_left) / 1e3
        parts = [f"connection lost, trying again for {left_s:.0f} s"]
    if progress.sent_bytes or progress.remaining_bytes:
        parts += [f"sent {size(progress.sent_bytes)}", f"remaining {size(progress.remaining_bytes)}"]
    if progress.bytes_per_second:
        parts.append(f"rate {size(progress.bytes_per_second)}/s")
    if progress.dirty_bytes_per_second:
        parts.append(f"dirty {size(progress.dirty_bytes_per_second)}/s")
    if progress.throttle_percent:
        parts.append(f"guest slowed down by {progress.throttle_percent} %")
    if migration.HasField("downtime"):
        parts.append(f"downtime {milliseconds(migration.downtime):.1f} ms")
    elif progress.HasField("expected_downtime"):
        parts.append(f"expected downtime {milliseconds(progress.expected_downtime):.0f} ms")
    if progress.HasField("eta") and migration.phase == MIGRATION_PHASE_PRECOPYING:
        parts.append(f"ETA {milliseconds(progress.eta) / 1e3:.1f} s")
    return ", ".join(parts)


class LineView:
    """One line per change, for files and pipes."""

    def __init__(self) -> None:
        self._stage: tuple[int, int, int, bool] | None = None
        self._next_line = 0.0

    def show(self, migration: Migration) -> None:
        """Print a line if something changed that is worth one."""
        progress = migration.progress
        lost = progress.HasField("disconnected_since")
        stage = (migration.phase, progress.round, migration.outcome, lost)
        now = time.monotonic()
        if stage == self._stage and now < self._next_line:
            return
        self._stage, self._next_line = stage, now + _LINE_EVERY_S
        say(": ".join(filter(None, (headline(migration), facts(migration)))))

    def note(self, text: str) -> None:
        """Print a line."""
        say(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class LiveView:
    """A bar for the current round with the figures below it, redrawn in place and wiped away at the end."""

    def __init__(self, screen: Console) -> None:
        self._live = Live(
            console=screen, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._round = -1
        self._round_bytes = 0

    def show(self, migration: Migration) -> None:
        """Redraw."""
        self._live.update(self._picture(migration), refresh=True)

    def note(self, text: str) -> None:
        """Put a line above the picture."""
        self._live.console.print(Text(text))

    def _picture(self, migration: Migration) -> Group:
        progress = migration.progress
        if progress.round != self._round:
            self._round, self._round_bytes = progress.round, 0
        self._round_bytes = max(self._round_bytes, progress.remaining_bytes)
        whole = (progress.round > 0 and not progress.remaining_bytes) or (
            migration.outcome != MIGRATION_OUTCOME_UNSPECIFIED
        )
        done = self._round_bytes - progress.remaining_bytes
        bar = ProgressBar(
            total=1 if whole else max(1, self._round_bytes),
            completed=1 if whole else done,
            width=_BAR_COLUMNS,
        )
        return Group(Text(headline(migration), style="bold"), Padding(bar), Text(facts(migration)))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
