"""Time without a connection is never a stall, and only progress makes up for it."""

from __future__ import annotations

import pytest

from vmferry.transfer.patience import Connections, Limits, Patience

LIMITS = Limits(stall_s=30.0, reconnect_s=60.0)


def connected(lanes: int = 2) -> Patience:
    """Lanes that were all connected at second 0."""
    patience = Patience(lanes, LIMITS, 0.0)
    for lane in range(lanes):
        patience.back(lane, 0.0)
        patience.progressed(lane, 0.0)
    return patience


def test_silence_of_connected_lanes_is_a_stall() -> None:
    """Only while something waits to be acknowledged."""
    patience = connected()
    assert not patience.stalled(30.0)
    assert patience.stalled(30.1)
    patience.idle(30.1)
    assert not patience.stalled(60.0)
    assert patience.reconnect_left_s(60.0) is None


def test_time_without_a_connection_is_no_stall() -> None:
    """A lane that is away stops the stall clock of all, as the others' frames may wait for its own."""
    patience = connected()
    assert patience.lost(0, 10.0)
    assert not patience.lost(0, 20.0)
    assert not patience.stalled(1000.0)
    assert (patience.connected, patience.all_lost_since) == (1, None)
    assert patience.back(0, 40.0) == 30.0
    assert not patience.stalled(70.0)
    assert patience.stalled(70.1)
    assert patience.connections(80.0) == Connections(2, True, None, 0.0, 30.0)


def test_the_silence_before_a_loss_belongs_to_it() -> None:
    """A black hole that was noticed after 15 s has used up 15 s of what a reconnect may take."""
    patience = connected()
    patience.lost(0, 15.0)
    patience.lost(1, 15.0)
    assert patience.all_lost_since == 15.0
    assert patience.reconnect_left_s(15.0) == 45.0
    assert patience.reconnect_left_s(61.0) == -1.0


def test_lanes_that_come_and_go_without_progress_run_out_of_time() -> None:
    """Each connection that carries nothing costs what came before it, too."""
    patience = connected()
    now = 0.0
    for _ in range(3):
        patience.lost(1, now)
        patience.back(1, now + 10)
        now += 15
    patience.lost(1, now)
    assert patience.reconnect_left_s(now) == pytest.approx(60.0 - 45.0)
    patience.back(1, now)
    patience.progressed(1, now)
    patience.lost(1, now)
    assert patience.reconnect_left_s(now) == 60.0


def test_at_first_nobody_is_connected() -> None:
    """Opening is waited for like a reconnect, and is no break that anything was lost in."""
    patience = Patience(3, LIMITS, 100.0)
    assert (patience.connected, patience.reconnect_left_s(130.0)) == (0, 30.0)
    assert patience.connections(130.0) == Connections(0, False, 30.0, 30.0, 0.0)
    for lane in range(3):
        patience.back(lane, 130.0)
        patience.progressed(lane, 130.0)
    assert (patience.connected, patience.all_lost_since) == (3, None)
    assert not patience.stalled(160.0)


def test_the_lane_that_is_worst_off_counts() -> None:
    """One path that stays dead ends the transfer, however well the others are."""
    patience = connected(3)
    patience.lost(2, 0.0)
    for second in range(1, 50):
        patience.progressed(0, float(second))
    patience.lost(0, 50.0)
    assert patience.reconnect_left_s(50.0) == 10.0
