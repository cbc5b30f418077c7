"""The commands about a drain: what is refused before anything is sent, what is printed, and how they end."""

from __future__ import annotations

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_source import HOST_A, HOST_B
from vmferry.cli.drain import exit_code
from vmferry.cli.drain_view import changes, drain_lines, headline, natural, what_may_be_done
from vmferry.errors import ExitCode
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1.migration_pb2 import Destination

WAITING, MOVING = dp.DRAINED_MACHINE_STATE_WAITING, dp.DRAINED_MACHINE_STATE_MOVING
MOVED, STAYS, BLOCKED = (
    dp.DRAINED_MACHINE_STATE_MOVED,
    dp.DRAINED_MACHINE_STATE_STAYS,
    dp.DRAINED_MACHINE_STATE_BLOCKED,
)


def machine(name: str, state: dp.DrainedMachineState.ValueType, reason: str = "") -> dp.DrainedMachine:
    made = dp.DrainedMachine(machine=name, machine_id=name, state=state, memory_bytes=64 << 20, attempts=2)
    made.destination.CopyFrom(Destination(host=HOST_B, address="b:1"))
    made.predicted_cost.FromMilliseconds(1500)
    if reason:
        made.obstacles.add(
            destination=HOST_B, reason=reason, message="it does not fit\x1b[2J", remedy="do this"
        )
    return made


def drain(state: dp.DrainState.ValueType, *machines: dp.DrainedMachine) -> dp.Drain:
    return dp.Drain(host=HOST_A, state=state, machines=machines, caller="spiffe://test.example/admin/jane")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("drain", "b", "--to", "c=10.0.0.3:7602"), "HOST"),
        (("drain", "a", "--to", "10.0.0.3:7602"), "--to"),
        (("drain", "a", "--to", "c=nowhere"), "--to"),
        (("drain", "a", "--to", "spiffe://test.example/admin/c=c:1"), "--to"),
        (("drain", "a", "--to", "c=c:1", "--request-id", "7"), "--request-id"),
        (("undrain", HOST_B), "HOST"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(call: Run, arguments: tuple[str, ...], field: str) -> None:
    """Above all another host than the one that is talked to: nothing is sent, and the option is named."""
    ran = call(*arguments)

    assert ran.code == ExitCode.USAGE
    assert field in ran.err
    assert ran.out == ""


def test_every_machine_is_shown_with_what_is_in_its_way_and_what_to_do() -> None:
    """The ones that need somebody come first; what other hosts say cannot command the terminal."""
    shown = "\n".join(
        drain_lines(
            drain(
                dp.DRAIN_STATE_STUCK,
                machine("gone", MOVED),
                machine("heavy", STAYS, "memory.insufficient"),
                machine("odd", BLOCKED, "OUTCOME_UNKNOWN"),
                machine("next", WAITING),
                machine("now", MOVING),
            )
        )
    )

    places = [shown.index(f"  {name} ") for name in ("odd", "heavy", "now", "next", "gone")]
    assert places == sorted(places)
    assert f"{HOST_B}: memory.insufficient: it does not fit" in shown
    assert "do this" in shown
    assert "\x1b" not in shown
    assert "1.5 s estimated" in shown
    assert f"to {HOST_B}" in shown
    assert "attempt 2" in shown


def test_the_headline_counts() -> None:
    """One line says how far it is."""
    text = headline(
        drain(dp.DRAIN_STATE_DRAINING, machine("x", MOVED), machine("y", MOVED), machine("z", MOVING))
    )

    assert text == f"{HOST_A} is being emptied: 1 moving, 2 moved"


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (drain(dp.DRAIN_STATE_DRAINED, machine("x", MOVED)), ExitCode.OK),
        (drain(dp.DRAIN_STATE_NONE), ExitCode.OK),
        (drain(dp.DRAIN_STATE_STUCK, machine("x", STAYS)), ExitCode.PRECONDITION),
        (drain(dp.DRAIN_STATE_STUCK, machine("x", STAYS), machine("y", BLOCKED)), ExitCode.UNKNOWN),
    ],
)
def test_the_exit_code_says_how_it_stands(found: dp.Drain, code: ExitCode) -> None:
    """Empty or undone, refused as things are, or not known."""
    assert exit_code(found) == code


def test_what_goes_on_what_comes_next_and_what_may_be_done_are_said() -> None:
    """In each state; machines that wait stand in the order in which they go."""
    second, first = machine("web-2", WAITING), machine("web-10", WAITING)
    second.turn, first.turn = 2, 1
    found = drain(dp.DRAIN_STATE_DRAINING, second, first)
    found.activity, found.trace_id = "web-10 goes next\x1b[2J", "ab" * 16

    lines = list(drain_lines(found))

    assert any(line.startswith("now         web-10 goes next") and "\x1b" not in line for line in lines)
    assert f"trace       {'ab' * 16}" in lines
    assert any(line.startswith("you may     vmferry undrain a stops it") for line in lines)
    assert next(i for i, line in enumerate(lines) if "web-10 " in line and "number 1 to go" in line) < next(
        i for i, line in enumerate(lines) if "web-2 " in line and "number 2 to go" in line
    )
    assert "vmferry undrain a" in what_may_be_done(drain(dp.DRAIN_STATE_STUCK))
    assert "lets machines in again" in what_may_be_done(drain(dp.DRAIN_STATE_DRAINED))
    assert what_may_be_done(drain(dp.DRAIN_STATE_NONE)) == ""
    assert sorted(["web-10", "web-2", "web"], key=natural) == ["web", "web-2", "web-10"]


def test_what_has_happened_is_told_machine_by_machine() -> None:
    """Where each goes, that it is there, or why it came back; a measurement is not told number by number."""
    before = drain(dp.DRAIN_STATE_DRAINING, machine("x", WAITING), machine("y", MOVING), machine("z", MOVING))
    before.activity = "measuring, 3 of 10 done"
    after = drain(
        dp.DRAIN_STATE_STUCK, machine("x", MOVING), machine("y", MOVED), machine("z", STAYS, "NOT_CONVERGING")
    )
    after.activity = "measuring, 4 of 10 done"

    lines = list(changes(before, after))

    assert lines[:2] == ["  x: moving to b", "  y: has moved to b (1 of 3)"]
    assert lines[2].startswith("  z: came back: NOT_CONVERGING at b: it does not fit")
    assert "\x1b" not in lines[2]
    assert "nothing that is left can move" in lines[3]
    assert len(lines) == 4
    assert list(changes(after, after)) == []
    waits = drain(dp.DRAIN_STATE_STUCK, machine("z", WAITING, "NOT_CONVERGING"))
    stays = drain(dp.DRAIN_STATE_STUCK, machine("z", STAYS, "NOT_CONVERGING"))
    assert list(changes(waits, stays)) == [], "it was told when it came back"
    assert list(changes(before, before)) == []
