"""A rate holds in every window of a second, is used up by a sender that can, and changes at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.transfer.pacer import Pacer
from vmferry.transfer.pacing import LEAST_BYTES_PER_S, TokenBucket, largest_frame

CHUNK = 1024 * 1024
RATES = st.integers(LEAST_BYTES_PER_S, 10_000_000_000)
TOLERANCE = 1.05


def play(
    bucket: TokenBucket, frames: list[tuple[float, int]], start_s: float = 0.0
) -> list[tuple[float, int]]:
    """When each frame goes out; each is given as how long its sender dawdles, and how large it is."""
    now, sent = start_s, []
    for dawdling_s, size in frames:
        now += dawdling_s
        now += bucket.wait_s(now)
        bucket.spend(size, now)
        sent.append((now, size))
    return sent


def most_in_a_window(sent: list[tuple[float, int]], seconds: float) -> int:
    """The most bytes that went out in any window of this length; the fullest one begins with a frame."""
    most = total = end = 0
    for begin, (since, size) in enumerate(sent):
        while end < len(sent) and sent[end][0] < since + seconds:
            total += sent[end][1]
            end += 1
        most = max(most, total)
        total -= size
        assert begin < end
    return most


@given(
    rate=RATES,
    dawdling=st.lists(st.floats(0, 0.2), min_size=200, max_size=200),
    shares=st.lists(st.floats(0.01, 1), min_size=200, max_size=200),
    window_s=st.floats(1.0, 3.0),
)
def test_no_window_of_a_second_has_more(
    rate: int, dawdling: list[float], shares: list[float], window_s: float
) -> None:
    """Whenever senders come, with frames of whatever allowed size, a second holds 5 % too much at most."""
    largest = largest_frame(rate, CHUNK)
    sent = play(
        TokenBucket(rate),
        [(wait / 50, int(largest * share)) for wait, share in zip(dawdling, shares, strict=True)],
    )
    assert most_in_a_window(sent, window_s) <= rate * window_s * TOLERANCE


@given(rate=RATES, late_s=st.floats(0, 0.01))
def test_a_busy_sender_gets_the_rate(rate: int, late_s: float) -> None:
    """A sender that is a little late every time loses nothing by it; what is missing is for the layers below."""
    size = largest_frame(rate, CHUNK)
    frames = max(50, int(2 * rate / size))
    least_s = size / rate
    sent = play(TokenBucket(rate), [(min(late_s, least_s), size)] * frames)
    seconds = sent[-1][0] - sent[0][0]
    assert sum(size for _, size in sent[:-1]) >= 0.97 * rate * seconds


@given(before=RATES, after=RATES)
def test_a_change_applies_to_what_was_sent_already(before: int, after: int) -> None:
    """A frame that is not paid for yet is paid for at the new rate."""
    bucket = TokenBucket(before)
    bucket.spend(CHUNK, 100.0)
    bucket.spend(CHUNK, 100.0 + bucket.wait_s(100.0))
    owed = bucket.wait_s(100.0) * before
    bucket.change(after, 100.0)
    assert bucket.wait_s(100.0) * after == pytest.approx(owed, rel=1e-6)
    bucket.change(None, 100.0)
    assert bucket.wait_s(100.0) == 0


def test_without_a_rate_nothing_waits() -> None:
    """No limit is no limit, and frames stay as large as they are."""
    bucket = TokenBucket()
    bucket.spend(CHUNK, 1.0)
    assert bucket.wait_s(1.0) == 0
    assert largest_frame(None, CHUNK) == CHUNK


@given(rate=RATES)
def test_frames_for_a_rate_are_whole_pages_and_short(rate: int) -> None:
    """At least a page, at most a fiftieth of a second, never more than asked for."""
    size = largest_frame(rate, CHUNK)
    assert size % 4096 == 0
    assert 4096 <= size <= CHUNK
    assert size <= rate * 0.02


def waiting(pacer: Pacer, given_up: Callable[[], bool] = lambda: False) -> threading.Thread:
    """A lane that waits for its turn."""
    thread = threading.Thread(target=pacer.admit, args=(CHUNK, given_up), daemon=True)
    thread.start()
    return thread


def test_a_change_wakes_who_waits() -> None:
    """Frames that would have to wait for minutes go out as soon as the rate is lifted."""
    pacer = Pacer(LEAST_BYTES_PER_S)
    pacer.admit(100 * CHUNK)
    first, behind = waiting(pacer), waiting(pacer)
    first.join(0.05)
    assert first.is_alive()
    pacer.change(None)
    first.join(60)
    behind.join(60)
    assert not first.is_alive()
    assert not behind.is_alive()


def test_who_gives_up_waiting_stops_nobody() -> None:
    """A lane that breaks while its frame waits leaves the turn to the next."""
    pacer = Pacer(LEAST_BYTES_PER_S)
    pacer.admit(100 * CHUNK)
    broken, over = threading.Event(), threading.Event()
    lanes = [waiting(pacer, broken.is_set), waiting(pacer, over.is_set)]
    broken.set()
    pacer.wake()
    lanes[0].join(60)
    assert not lanes[0].is_alive() or lanes[1].is_alive()
    over.set()
    pacer.wake()
    for lane in lanes:
        lane.join(60)
        assert not lane.is_alive()
