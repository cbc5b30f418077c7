"""When a guest's clock may be set, and how what was found travels."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.machines.agents import ScriptedAgent, guest
from vmferry.errors import MachineFailedError
from vmferry.machines.agent import Reading
from vmferry.machines.clock import (
    CLOCK_DEVICE,
    GUEST_AGENT,
    NONE,
    RTC,
    ClockFinding,
    finding_of,
    is_safe,
    put_right,
    tell,
)
from vmferry.v1 import clock_pb2

MS = 10**6
NOW = 1_800_000_000_000 * MS


def reading(offset_ms: float, took_ms: float) -> Reading:
    """A guest whose clock is off by so much, read in the middle of so long."""
    asked = NOW
    return Reading(round(asked + (took_ms / 2 + offset_ms) * MS), asked, round(asked + took_ms * MS))


@pytest.mark.parametrize(
    ("offsets", "took_ms", "safe"),
    [
        ((-1000, -1000, -1000), 2, True),
        ((-50, -50, -50), 2, True),
        ((-50, -50, -50), 20, False),
        ((-1, -1, -1), 2, False),
        ((0, 0, 0), 2, False),
        ((1000, 1000, 1000), 2, False),
        ((-1000, -1000, 5), 2, False),
    ],
)
def test_a_clock_is_set_if_it_is_behind_by_far_more_than_an_answer_takes(
    offsets: tuple[float, ...], took_ms: float, *, safe: bool
) -> None:
    """Not one that is ahead, and not one that the time on its way would overtake."""
    assert is_safe([reading(offset, took_ms) for offset in offsets]) is safe


@given(
    st.integers(-30_000, 30_000),
    st.lists(st.floats(0.1, 500), min_size=3, max_size=3),
    st.floats(0, 1),
)
def test_what_is_safe_does_not_go_back(offset_ms: int, took_ms: list[float], where: float) -> None:
    """An agent that sets its clock as late as its slowest answer came never sets it to what it had passed."""
    readings = [
        Reading(round(NOW + (took * where + offset_ms) * MS), NOW, round(NOW + took * MS)) for took in took_ms
    ]
    if is_safe(readings):
        late_ms = max(took_ms)
        own_ms = late_ms + offset_ms  # what the guest's clock has come to, counted from NOW
        assert own_ms < 0  # and what it is given is NOW, or later


def test_what_another_host_found_is_completed_with_the_pause() -> None:
    """Which only the source knows; what was measured stays as it was measured."""
    measured = ClockFinding(-5000, -3, GUEST_AGENT, measured=True, note="n", uncertainty_us=7)
    message = clock_pb2.ClockReport()
    tell(measured, message)
    assert finding_of(message, 0.1) == measured
    tell(ClockFinding(0, 0, RTC, measured=False), message)
    assert finding_of(message, 0.1) == ClockFinding(-100_000, -100_000, RTC, measured=False)
    assert finding_of(message) == ClockFinding(0, 0, RTC, measured=False)
    tell(ClockFinding(0, 0, CLOCK_DEVICE, measured=False), message)
    assert finding_of(message, 0.1) == ClockFinding(-100_000, 0, CLOCK_DEVICE, measured=False)


def test_words_of_another_host_are_bounded() -> None:
    """A method that is none, and a note without end."""
    found = finding_of(clock_pb2.ClockReport(method="magic", note="x" * 10_000))
    assert found.method == NONE
    assert len(found.note) == 500


class Hypervisor:
    """As much of QEMU as is asked about a clock."""

    def __init__(self, socket: Path, *, opened: bool = True, dead: bool = False) -> None:
        self.spec = SimpleNamespace(kind="qemu", uuid="u", qemu=SimpleNamespace(agent=True))
        self.paths = SimpleNamespace(agent_socket=socket)
        self._opened = opened
        self._dead = dead

    async def ask(self, command: str, _arguments: object = None) -> Any:
        """Answer as QEMU does."""
        if self._dead:
            raise MachineFailedError("it does not answer")
        return {"query-chardev": [{"label": "agent", "frontend-open": self._opened}]}.get(command, {})

    async def close(self) -> None:
        """Nothing is held."""


async def found_with(agent: ScriptedAgent, path: Path, *, limit_s: float = 5.0) -> ClockFinding:
    """What is found of a guest with such an agent, paused for a second."""
    async with guest(path, agent.serve):
        machine: Any = Hypervisor(path)
        return await put_right(machine, 1.0, agent_timeout_s=limit_s)


async def test_a_clock_that_is_behind_is_set_and_read_again(tmp_path: Path) -> None:
    """Both offsets are what the guest says."""
    found = await found_with(ScriptedAgent(-3_000_000_000), tmp_path / "s")
    assert (found.method, found.measured, found.note) == (GUEST_AGENT, True, "")
    assert found.before_us == pytest.approx(-3_000_000, abs=100_000)
    assert abs(found.after_us) < 100_000


@pytest.mark.parametrize("offset_ns", [4_000_000_000, 0])
async def test_a_clock_that_is_not_behind_is_left(tmp_path: Path, offset_ns: int) -> None:
    """It is never told the time, so it cannot be set back; what it says is told."""
    agent = ScriptedAgent(offset_ns)
    found = await found_with(agent, tmp_path / "s")
    assert "guest-set-time" not in agent.asked
    assert (found.method, found.measured) == (NONE, True)
    assert found.before_us == found.after_us == pytest.approx(offset_ns / 1000, abs=100_000)
    assert "it was left as it is" in found.note


async def test_an_agent_that_sets_its_clock_too_late_is_told_of(tmp_path: Path) -> None:
    """It went back by what the agent took: nobody can prevent that, and it is said."""
    found = await found_with(ScriptedAgent(-300_000_000, delay_s=0.6), tmp_path / "s")
    assert found.measured
    assert found.after_us < found.before_us
    assert "set it back" in found.note


async def test_an_agent_that_refuses_is_told_of(tmp_path: Path) -> None:
    """With the offsets as they are."""
    found = await found_with(ScriptedAgent(-3_000_000_000, refuses=True), tmp_path / "s")
    assert found.measured
    assert found.after_us == pytest.approx(found.before_us, abs=100_000)
    assert "failed" in found.note
    assert "no hwclock" not in found.note


@pytest.mark.parametrize(
    ("silent_at", "words"),
    [
        ("guest-sync-delimited", "did not answer"),
        ("guest-get-time", "did not answer"),
        ("guest-set-time", "may have set"),
    ],
)
async def test_an_agent_that_falls_silent_is_not_waited_for(
    tmp_path: Path, silent_at: str, words: str
) -> None:
    """Within the time that it has, whatever it was asked; what is known then is told, and not as measured."""
    began = time.monotonic()
    found = await found_with(ScriptedAgent(-3_000_000_000, silent_at=silent_at), tmp_path / "s", limit_s=0.3)
    assert time.monotonic() - began < 5
    assert (found.method, found.measured) == (NONE, False)
    assert words in found.note


async def test_what_cannot_be_asked_raises_nothing(tmp_path: Path) -> None:
    """Nobody has opened the channel, nothing listens behind it, or the hypervisor itself does not answer."""
    closed: Any = Hypervisor(tmp_path / "none", opened=False)
    found = await put_right(closed, 1.0, agent_timeout_s=1)
    assert (found.method, found.before_us, found.after_us) == (RTC, -1_000_000, -1_000_000)
    assert "no agent" in found.note
    for machine, words in (
        (Hypervisor(tmp_path / "none"), "cannot be reached"),
        (Hypervisor(tmp_path / "none", dead=True), "does not answer"),
    ):
        hypervisor: Any = machine
        found = await put_right(hypervisor, None, agent_timeout_s=1)
        assert (found.method, found.measured, found.before_us) == (NONE, False, 0)
        assert words in found.note
