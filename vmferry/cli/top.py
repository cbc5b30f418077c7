"""``vmferry top``: all machines and migrations of several hosts on one screen.

Promise: what is shown was answered within the last interval, or it says how long ago; a host that does not answer is
shown as such, with why, and hides no other. Nothing is changed by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vmferry.cli.connection import Source
from vmferry.cli.drain_view import what_may_be_done
from vmferry.cli.hosts import Hosts, Told, calls_hosts, finish
from vmferry.cli.output import console, harmless, label, milliseconds, size
from vmferry.cli.progress import outcome_name, phase_name
from vmferry.errors import VmferryError
from vmferry.v1 import drain_pb2, machine_pb2
from vmferry.v1.machine_pb2 import Machine
from vmferry.v1.migration_pb2 import MIGRATION_OUTCOME_UNKNOWN, MIGRATION_PHASE_PRECOPYING, Migration

_BAR_COLUMNS: Final = 16
_STATES: Final = {"running": "green", "paused": "yellow", "incoming": "cyan", "dead": "red"}


@dataclass(frozen=True)
class Load:
    """What one host has to do."""

    machines: Sequence[Machine]
    migrations: Sequence[Migration]
    """Those that have not ended."""
    drain: drain_pb2.Drain = field(default_factory=drain_pb2.Drain)


async def _load(source: Source) -> Load:
    machines, migrations, drain = await asyncio.gather(
        source.list_machines(), source.history(open_only=True), _drain(source)
    )
    return Load(machines, migrations, drain)


async def _drain(source: Source) -> drain_pb2.Drain:
    try:
        return await source.get_drain()
    except VmferryError:  # a release that knows of none; what else it does not answer shows in the others
        return drain_pb2.Drain()


@calls_hosts
async def top(
    hosts: Hosts,
    *,
    interval_s: Annotated[
        float, typer.Option("--interval-s", min=0.1, max=60, help="Time between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and print it.")] = False,
) -> None:
    """Show all machines and migrations of several hosts, live; q ends it."""
    screen = console(stderr=False)
    if once or not screen.is_terminal:
        told = await hosts.ask(_load)
        screen.print(picture(told, Rounds()))
        finish(told)
        return
    await _show(hosts, screen, interval_s)


async def _show(hosts: Hosts, screen: Console, interval_s: float) -> None:
    leave, rounds = asyncio.Event(), Rounds()
    with _keyboard(leave), Live(console=screen, screen=True, auto_refresh=False) as live:
        while not leave.is_set():
            started = time.monotonic()
            told = await hosts.ask(_load, limit_s=max(1.0, 2 * interval_s))
            live.update(picture(told, rounds), refresh=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, interval_s - (time.monotonic() - started))):
                    await leave.wait()


@contextlib.contextmanager
def _keyboard(leave: asyncio.Event) -> Iterator[None]:
    """Have q end it; the terminal is afterwards as it was before."""
    if not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    loop = asyncio.get_running_loop()

    def typed() -> None:
        if os.read(keyboard, 64).lower() in {b"q", b"\x1b", b""}:
            leave.set()

    try:
        tty.setcbreak(keyboard)
        loop.add_reader(keyboard, typed)
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


class Rounds:
    """How large the current round of each migration was when it was first seen."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def share(self, migration: Migration) -> float:
        """How much of its current round is done, as far as can be told."""
        progress = migration.progress
        number, largest = self._seen.get(migration.id, (0, 0))
        left = progress.remaining_bytes
        largest = max(largest, left) if number == progress.round else left
        if progress.round == 1:  # the first one takes all that the machine holds
            largest = max(largest, progress.sent_bytes + left)
        self._seen[migration.id] = (progress.round, largest)
        if migration.phase > MIGRATION_PHASE_PRECOPYING:
            return 1.0
        return 1 - left / largest if largest else 0.0


def picture(told: Sequence[Told[Load]], rounds: Rounds) -> RenderableType:
    """The whole screen."""
    parts: list[RenderableType] = [_hosts(told), Text()]
    parts += [_migrations(told, rounds), Text(), _machines(told)]
    parts += [Text(harmless(line), style="cyan") for line in _drains(told)]
    parts += [Text(harmless(line), style="red") for line in _troubles(told)]
    return Group(*parts)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _hosts(told: Sequence[Told[Load]]) -> Table:
    table = _table("HOST", "STATE", "MACHINES", "LEAVING", "BLOCKED", "ADDRESS")
    for one in told:
        if one.answer is None:
            assert one.error is not None
            state = Text(one.error.reason.lower().replace("_", " "), style="bold red")
            table.add_row(one.name, state, "?", "?", "?", one.address)
            continue
        blocked = sum(machine.HasField("blockage") for machine in one.answer.machines)
        table.add_row(
            one.name,
            _state(one.answer.drain),
            str(len(one.answer.machines)),
            str(len(one.answer.migrations)),
            Text(str(blocked), style="bold red" if blocked else ""),
            one.address,
        )
    return table


def _state(drain: drain_pb2.Drain) -> Text:
    """Whether a host is being emptied, and how far."""
    moved = sum(one.state == drain_pb2.DRAINED_MACHINE_STATE_MOVED for one in drain.machines)
    done = f"{moved}/{len(drain.machines)}"
    match drain.state:
        case drain_pb2.DRAIN_STATE_DRAINING:
            return Text(f"being emptied {done}", style="cyan")
        case drain_pb2.DRAIN_STATE_STUCK:
            return Text(f"not empty, stuck {done}", style="bold red")
        case drain_pb2.DRAIN_STATE_DRAINED:
            return Text("emptied", style="cyan")
    closed = drain.state == drain_pb2.DRAIN_STATE_NONE and not drain.takes_newcomers
    return Text("takes no newcomers" if closed else "answers", style="green")


def _migrations(told: Sequence[Told[Load]], rounds: Rounds) -> RenderableType:
    table = _table("MIGRATION", "FROM", "TO", "PHASE", "ROUND", "", "RATE", "DIRTY", "PAUSE", "ETA")
    for one in told:
        for migration in one.answer.migrations if one.answer else ():
            progress = migration.progress
            unknown = migration.outcome == MIGRATION_OUTCOME_UNKNOWN
            table.add_row(
                Text(harmless(migration.machine), style="bold"),
                one.name,
                harmless(migration.destination.host.rpartition("/")[2]),
                Text(
                    f"outcome {outcome_name(migration)}" if unknown else phase_name(migration),
                    style="bold red" if unknown else "cyan",
                ),
                str(progress.round or "-"),
                ProgressBar(total=1, completed=rounds.share(migration), width=_BAR_COLUMNS),
                f"{size(progress.bytes_per_second)}/s" if progress.bytes_per_second else "-",
                f"{size(progress.dirty_bytes_per_second)}/s" if progress.dirty_bytes_per_second else "-",
                _pause(migration),
                f"{milliseconds(progress.eta) / 1e3:.0f} s" if progress.HasField("eta") else "-",
            )
    return table if table.row_count else Text("nothing is on its way", style="dim")


def _pause(migration: Migration) -> str:
    """The guest's pause: as it was, as it would be now, or as it was predicted."""
    if migration.HasField("downtime"):
        return f"{milliseconds(migration.downtime):.0f} ms"
    if migration.progress.HasField("expected_downtime"):
        return f"~{milliseconds(migration.progress.expected_downtime):.0f} ms"
    if migration.HasField("prediction"):
        return f"~{milliseconds(migration.prediction.downtime.expected):.0f} ms"
    return "-"


def _machines(told: Sequence[Told[Load]]) -> RenderableType:
    table = _table("MACHINE", "HOST", "STATE", "RIGHT", "MEMORY", "KIND", "BLOCKED")
    for one in told:
        for machine in one.answer.machines if one.answer else ():
            state = label(machine_pb2.MachineState, machine.state, "MACHINE_STATE_")
            table.add_row(
                Text(harmless(machine.name or machine.uuid), style="bold"),
                one.name,
                Text(state, style=_STATES.get(state, "")),
                label(machine_pb2.MachineRight, machine.right, "MACHINE_RIGHT_"),
                size(machine.spec.memory_mib * 1024 * 1024),
                harmless(machine.spec.kind),
                Text(harmless(machine.blockage.reason), style="bold red"),
            )
    return table if table.row_count else Text("no machines", style="dim")


def _drains(told: Sequence[Told[Load]]) -> Iterator[str]:
    """What goes on where a host is being emptied, and what may be done about it."""
    for one in told:
        drain = one.answer.drain if one.answer else drain_pb2.Drain()
        if drain.activity:
            yield f"{one.name}: {drain.activity}"
        if may := what_may_be_done(drain):
            yield f"{one.name}: you may: {may}"


def _troubles(told: Sequence[Told[Load]]) -> Iterator[str]:
    """What somebody should know, in sentences."""
    for one in told:
        if one.error is not None:
            yield f"host {one.name} at {one.address}: {one.error.message}"
        if one.answer and one.answer.drain.HasField("problem"):
            problem = one.answer.drain.problem
            yield f"the drain of {one.name} is held up: {problem.reason}: {problem.message} {problem.remedy}"
        for machine in one.answer.machines if one.answer else ():
            if machine.HasField("blockage"):
                blockage = machine.blockage
                yield f"{machine.name or machine.uuid} on {one.name}: {blockage.message} {blockage.remedy}"
        for migration in one.answer.migrations if one.answer else ():
            if migration.progress.HasField("disconnected_since"):
                left_s = milliseconds(migration.progress.reconnect_left) / 1e3
                yield f"{migration.machine}: connection lost, trying again for {left_s:.0f} s"
