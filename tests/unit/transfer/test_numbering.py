"""Frames are taken in exactly once and in order, whatever a lane's connections do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import StreamBrokenError
from vmferry.transfer.numbering import Arrival, ReceivingLane, SendingLane, Totals


def test_a_gap_is_never_accepted() -> None:
    """A frame that comes too early breaks the stream instead of leaving a hole."""
    lane = ReceivingLane()
    lane.taken(10)
    with pytest.raises(StreamBrokenError, match="frame 3 came where 2 was due"):
        lane.arrival(3)


@pytest.mark.parametrize("sequence", [0, -1])
def test_numbers_start_at_one(sequence: int) -> None:
    """A number that was never given out is no repetition."""
    lane = ReceivingLane()
    lane.taken(1)
    with pytest.raises(StreamBrokenError):
        lane.arrival(sequence)


def test_a_repeated_frame_is_known() -> None:
    """A frame that was taken in is recognised when it comes again."""
    lane = ReceivingLane()
    assert lane.arrival(1) is Arrival.NEW
    lane.taken(5)
    assert lane.arrival(1) is Arrival.REPEATED


def test_a_frame_that_failed_halfway_is_still_new() -> None:
    """Only what was taken in completely counts."""
    lane = ReceivingLane()
    lane.arrival(1)
    assert lane.arrival(1) is Arrival.NEW


@pytest.mark.parametrize("claimed", [Totals(1, 5), Totals(2, 4), Totals(3, 5)])
def test_ends_that_count_differently_do_not_agree(claimed: Totals) -> None:
    """The end of a lane is checked against both counts."""
    lane = ReceivingLane()
    lane.taken(2)
    lane.taken(3)
    lane.check_end(Totals(2, 5))
    with pytest.raises(StreamBrokenError, match="counts"):
        lane.check_end(claimed)


def test_what_was_never_sent_cannot_be_acknowledged() -> None:
    """An acknowledgement from the future is an error, not progress."""
    lane: SendingLane[str] = SendingLane(100)
    lane.sent("a", frame_bytes=10, data_bytes=8)
    with pytest.raises(StreamBrokenError, match="only 1 were sent"):
        lane.acknowledge(2)


def test_the_window_bounds_what_is_in_flight() -> None:
    """There is room again only after an acknowledgement; a lane with nothing in flight takes any frame."""
    lane: SendingLane[str] = SendingLane(100)
    assert lane.has_room(1000)
    lane.sent("a", frame_bytes=60, data_bytes=50)
    assert lane.has_room(40)
    assert not lane.has_room(41)
    assert lane.acknowledge(1) == 60
    assert lane.has_room(100)
    assert lane.idle


def test_late_and_repeated_acknowledgements_change_nothing() -> None:
    """Acknowledgements are cumulative."""
    lane: SendingLane[int] = SendingLane(100)
    for number in range(3):
        lane.sent(number, frame_bytes=1, data_bytes=1)
    assert lane.acknowledge(3) == 3
    assert lane.acknowledge(1) == 0
    assert lane.acknowledged == 3


@given(st.lists(st.sampled_from(["send", "deliver", "acknowledge", "break"]), max_size=200))
def test_every_frame_arrives_once_and_in_order(story: list[str]) -> None:
    """Over any number of broken connections, what is taken in is exactly what was sent."""
    sender: SendingLane[int] = SendingLane(1 << 20)
    receiver = ReceivingLane()
    wire: list[tuple[int, int]] = []
    taken: list[int] = []

    def deliver() -> None:
        sequence, payload = wire.pop(0)
        if receiver.arrival(sequence) is Arrival.NEW:
            taken.append(payload)
            receiver.taken(1)

    def reopen() -> None:
        sender.acknowledge(receiver.totals.frames)
        first = sender.acknowledged + 1
        wire[:] = list(enumerate(sender.unacknowledged(), start=first))

    for step in story:
        match step:
            case "send":
                sequence = sender.next_sequence
                sender.sent(sequence * 7, frame_bytes=1, data_bytes=1)
                wire.append((sequence, sequence * 7))
            case "deliver" if wire:
                deliver()
            case "acknowledge":
                sender.acknowledge(receiver.totals.frames)
            case "break":
                reopen()
    reopen()
    while wire:
        deliver()
    assert taken == [number * 7 for number in range(1, sender.totals.frames + 1)]
    receiver.check_end(sender.totals)
