"""What migrations may have in flight: each its own window, all together their budget, in equal parts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmferry.memory.runs import PAGE_SIZE
from vmferry.transfer.window import Budget, Window, frame_for

MIB = 1024 * 1024


def test_a_part_shrinks_as_others_begin_and_grows_as_they_end() -> None:
    """Nobody has less than an equal part because of others, and nobody more than its own window."""
    budget = Budget(48 * MIB)
    windows = [budget.window(2, 16 * MIB, 2 * MIB) for _ in range(10)]
    windows[0].open()
    assert windows[0].window_bytes == 16 * MIB
    for window in windows:
        window.open()
    assert {window.window_bytes for window in windows} == {48 * MIB // 10}
    assert {window.frame_bytes for window in windows} == {48 * MIB // 40 // PAGE_SIZE * PAGE_SIZE}
    for window in windows[1:]:
        window.close()
        window.close()
    assert windows[0].window_bytes == 16 * MIB
    assert windows[0].frame_bytes == 2 * MIB


def test_a_window_without_a_budget_is_its_own() -> None:
    """As in a measurement, which has nobody beside it."""
    window = Window(3, 9 * MIB, 2 * MIB)
    window.open()
    window.close()
    assert (window.window_bytes, window.frame_bytes) == (9 * MIB, 9 * MIB // 6 // PAGE_SIZE * PAGE_SIZE)


@given(
    st.integers(4096, 256 * MIB),
    st.lists(st.tuples(st.integers(2, 16), st.integers(4096, 64 * MIB)), min_size=1, max_size=40),
)
def test_together_they_keep_to_the_budget(shared: int, sizes: list[tuple[int, int]]) -> None:
    """Whatever their own windows; and each can always make a frame of a page."""
    budget = Budget(shared)
    windows = [budget.window(lanes, size, 2 * MIB) for lanes, size in sizes]
    for window in windows:
        window.open()
    assert sum(window.window_bytes for window in windows) <= shared
    assert all(PAGE_SIZE <= window.frame_bytes <= 2 * MIB for window in windows)


@given(st.integers(2, 16), st.integers(4096, 64 * MIB), st.integers(1, 512))
def test_a_lanes_part_holds_two_frames(lanes: int, window: int, pages: int) -> None:
    """Of whole pages, and at least one."""
    frame = frame_for(lanes, window, pages * PAGE_SIZE)
    assert frame % PAGE_SIZE == 0
    assert frame <= pages * PAGE_SIZE
    assert frame == PAGE_SIZE or 2 * frame * lanes <= window
