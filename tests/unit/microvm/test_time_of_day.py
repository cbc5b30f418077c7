"""The time of day that the micro-VM tells its guest: the host's, and never an earlier one than before."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.machines.microvm import devices
from vmferry.machines.microvm.devices import PORT_REALTIME, Clock
from vmferry.machines.microvm.ports import PortBus

S = 10**9
NOON = 1_800_000_000 * S


@dataclass
class HostClock:
    """Both clocks of a host, which a test moves."""

    wall_ns: int = NOON
    monotonic: int = 5 * S

    def time_ns(self) -> int:
        """The time of day, which may be set."""
        return self.wall_ns

    def monotonic_ns(self) -> int:
        """What nobody can set."""
        return self.monotonic

    def passes(self, ns: int) -> None:
        """Time goes on."""
        self.wall_ns += ns
        self.monotonic += ns


class Guest:
    """A guest that reads its clock, in whichever process it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._enter(HostClock())

    def _enter(self, host: HostClock) -> None:
        self.host = host
        self._patch.setattr(devices, "time", host)
        self.bus = PortBus()
        self.clock = Clock(self.bus)

    def read(self) -> int:
        """The time of day, as a guest program reads it."""
        low = self.bus.read(PORT_REALTIME, 4)
        return self.bus.read(PORT_REALTIME + 4, 4) << 32 | low

    def start(self) -> None:
        """Run."""
        self.clock.start(self.host.monotonic)

    def stop(self) -> None:
        """Pause."""
        self.clock.stop(self.host.monotonic)

    def moves(self, skew_ns: int) -> None:
        """Go on in another process, on a host whose clock is ahead by so much, or behind."""
        saved, told = self.clock.save(), self.clock.told_ns
        self._enter(HostClock(self.host.wall_ns + skew_ns, monotonic=77 * S))
        self.clock.prepare(saved)()
        self.clock.keep(told)


def test_it_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause shows as what it took: the time of day goes on meanwhile."""
    guest = Guest(monkeypatch)
    guest.start()
    assert guest.clock.offset_at_start_ns is None
    assert guest.read() == NOON
    guest.host.passes(S)
    guest.stop()
    guest.host.passes(20 * S)
    guest.start()
    assert guest.clock.offset_at_start_ns == -20 * S
    assert guest.read() == guest.clock.realtime_ns() == guest.host.wall_ns == NOON + 21 * S


def test_at_a_host_that_is_behind_it_runs_at_half_speed_until_that_has_caught_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five seconds behind: for ten seconds the guest's clock neither steps back nor stands, and then it is right."""
    guest = Guest(monkeypatch)
    guest.start()
    first = guest.read()
    guest.stop()
    guest.moves(-5 * S)
    guest.start()
    assert guest.clock.offset_at_start_ns == 5 * S
    for seconds in range(1, 13):
        guest.host.passes(S)
        assert guest.read() == max(first + seconds * S // 2, guest.host.wall_ns)
    assert guest.read() == guest.host.wall_ns


def test_a_clock_of_the_host_that_is_set_back_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever corrects the host's clock by a step, the guest sees none."""
    guest = Guest(monkeypatch)
    guest.start()
    before = guest.read()
    guest.host.wall_ns -= 3 * S
    guest.host.passes(S)
    assert guest.read() == before + S // 2


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("passes"), st.integers(0, 30 * S)),
        st.tuples(st.just("set"), st.integers(-10 * S, 10 * S)),
        st.tuples(st.just("pause"), st.integers(0, 30 * S)),
        st.tuples(st.just("move"), st.integers(-10 * S, 10 * S)),
    ),
    max_size=30,
)


@given(STEPS)
def test_it_never_goes_back(steps: list[tuple[str, int]]) -> None:
    """Whatever hosts, pauses and corrections come together; and it is never behind the host it is on."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        guest = Guest(monkeypatch)
        guest.start()
        last = guest.read()
        for what, ns in steps:
            if what == "passes":
                guest.host.passes(ns)
            elif what == "set":
                guest.host.wall_ns += ns
            else:
                guest.stop()
                guest.host.passes(abs(ns))
                if what == "move":
                    guest.moves(ns)
                guest.start()
            now = guest.read()
            assert now >= last
            assert now >= guest.host.wall_ns
            last = now


def test_a_time_that_cannot_be_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that names a time beyond what the guest can read breaks nothing."""
    guest = Guest(monkeypatch)
    guest.clock.keep(1 << 64)
    guest.start()
    assert guest.read() == (1 << 63) - 1
