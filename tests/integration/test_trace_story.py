"""The story that one trace tells of a migration, from the scheduler over the source to the destination."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import vmferry
from tests.integration.hosts import MIB, World
from tests.integration.services import eventually
from vmferry.errors import TraceNotFoundError
from vmferry.telemetry.clocks import estimate_clocks
from vmferry.telemetry.drawing import pause_of, render_svg
from vmferry.telemetry.spans import SpanNode, SpanRecord, load_spans, span_tree

pytestmark = pytest.mark.usefixtures("tidy")

SCHEDULER, SOURCE, DESTINATION = "scheduler", "vmferry-source", "vmferry-dest"
CALL = "vmferry.v1.DestinationService/"
AT_DESTINATION = {"receive", "prepare", "verify", "load", "own", "resume", "clock"}


async def scheduled(world: World, machine: str) -> dict[str, str]:
    """Have the command line schedule a migration, as a process of its own, and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-c",
            "from vmferry.cli.main import main; raise SystemExit(main())",
            "migrate",
            machine,
        ),
        *("--source", world.a.source.address, "--source-host", world.a.identity.uri),
        *("--to-host", world.b.identity.uri, "--to-address", world.b.dest.address),
        *("--tls", str(world.tls_dir("controller")), "--trace-dir", str(world.trace_dir), "--json"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        cwd=world.root,
        env=os.environ | {"PYTHONPATH": str(Path(vmferry.__file__).parents[1])},
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    found: dict[str, str] = json.loads(out)
    return found


def walk(nodes: tuple[SpanNode, ...]) -> Iterator[tuple[SpanNode, tuple[str, ...]]]:
    """Every span below, with the names on the way to it."""
    for node in nodes:
        yield node, (node.span.name,)
        for inner, path in walk(node.children):
            yield inner, (node.span.name, *path)


async def test_one_trace_tells_it_all(world: World) -> None:
    """Every phase of the design is one span where it belongs, nothing failed, and no span stands for a chunk."""
    guest = await world.run(memory_mib=64, params={"resident-mib": "24"})
    trace_id = (await scheduled(world, guest.id))["trace_id"]

    def complete() -> list[SpanRecord]:
        try:
            spans = load_spans([world.trace_dir], trace_id)
        except TraceNotFoundError:
            return []  # they are written a moment after they end
        names = {(span.service, span.name) for span in spans}
        return spans if {(SOURCE, "migrate"), (SCHEDULER, "schedule"), (DESTINATION, "own")} <= names else []

    spans = await eventually(complete, "all spans are written")
    (root,) = span_tree(spans)
    assert (root.span.name, root.span.service) == ("schedule", SCHEDULER)
    assert not [span for span in spans if span.failed]
    assert {span.host for span in spans if span.service == SOURCE} == {"a"}
    assert {span.host for span in spans if span.service == DESTINATION} == {"b"}

    paths = {path: node for node, path in walk((root,))}
    (migrate,) = [node for path, node in paths.items() if path[-1] == "migrate"]
    ours = [child.span.name for child in migrate.children if not child.span.name.startswith("vmferry.")]
    assert ours == ["negotiate", "reserve", "precopy", "switchover", "release", "clock"]
    inside = {child.span.name: child for child in migrate.children}
    rounds = [child.span.name for child in inside["precopy"].children if "/" not in child.span.name]
    assert rounds
    assert set(rounds) == {"round"}
    switchover = [child.span.name for child in inside["switchover"].children]
    assert sorted(switchover) == sorted(["pause", "last round", "device state", "seal", "commit"])
    assert switchover[0] == "pause"
    assert switchover[-2:] == ["seal", "commit"]

    tails = {path[-2:] for path in paths} | {path[-3:] for path in paths}
    for tail in (
        ("negotiate", CALL + "Negotiate"),
        ("reserve", CALL + "Begin"),
        ("seal", CALL + "Seal"),
        ("commit", CALL + "Go"),
        (CALL + "Transfer", "receive"),
        (CALL + "Seal", "verify"),
        (CALL + "Go", "own"),
        ("own", "resume"),
        ("own", "clock"),
        ("clock", "vmferry.v1.ClockService/GetClock"),
    ):
        assert tail in tails, f"{tail} is missing"
    # What came last made it load: as a rule a lane's end, now and then the call that seals.
    assert tails & {("receive", "load"), (CALL + "Seal", "load")}
    for span in spans:
        if span.service == DESTINATION:
            assert span.name in AT_DESTINATION or "/" in span.name
    chunks = 24 * MIB // MIB
    counts = Counter(span.name for span in spans)
    assert counts["receive"] == world.a.config.lanes
    assert max(count for name, count in counts.items() if name != "round") < chunks


async def test_a_failed_migration_is_told_where_it_failed(world: World) -> None:
    """The span in which it failed carries the reason; what went well before it does not."""
    guest = await world.run()
    migration = await world.migrate(guest, world.a, world.b, reserve_timeout=0.001)

    def complete() -> dict[str, SpanRecord]:
        try:
            spans = load_spans([world.trace_dir], migration.trace_id)
        except TraceNotFoundError:
            return {}  # they are written a moment after they end
        found = {span.name: span for span in spans if span.service == SOURCE}
        return found if "migrate" in found else {}

    spans = await eventually(complete, "all spans are written")
    assert spans["reserve"].failed
    assert spans["reserve"].message
    assert not spans["negotiate"].failed
    await world.assert_stays(guest, world.a, world.b)


async def test_the_clocks_of_both_hosts_are_compared(world: World, tmp_path: Path) -> None:
    """By the calls of a real migration: the same clock is found to be the same, and one that is wrong to be wrong."""
    guest = await world.run()
    migration = await world.migrate(guest, world.a, world.b)

    def complete() -> list[SpanRecord]:
        try:
            spans = load_spans([world.trace_dir], migration.trace_id)
        except TraceNotFoundError:
            return []
        names = {(span.service, span.name) for span in spans}
        return spans if {(SOURCE, "migrate"), (DESTINATION, "own")} <= names else []

    spans = await eventually(complete, "all spans are written")
    clock = estimate_clocks(spans)["b"]
    assert abs(clock.offset_ns) <= clock.error_ns
    assert clock.calls >= 3
    assert clock.error_ns < 50e6
    wrong_ns = -3_600_000_000_000
    shifted = [
        replace(span, start_ns=span.start_ns + wrong_ns, end_ns=span.end_ns + wrong_ns)
        if span.host == "b"
        else span
        for span in spans
    ]
    assert abs(estimate_clocks(shifted)["b"].offset_ns - wrong_ns) <= clock.error_ns
    paused = pause_of(spans)
    assert paused is not None
    assert (paused[1] - paused[0]) / 1e6 == pytest.approx(migration.downtime.ToNanoseconds() / 1e6, abs=0.01)
    drawing = tmp_path / "trace.svg"
    drawing.write_text(render_svg(shifted), encoding="utf-8")
    assert "the guest&#x27;s pause" in drawing.read_text(encoding="utf-8")
