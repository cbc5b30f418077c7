"""The life of events, the numbers of documents, and boards as they are kept and handed on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.events.samples import EVENT, ID, NOW, OTHER
from vmferry.events import document, policy, records, states
from vmferry.events.files import ARRIVING, BoardFiles
from vmferry.events.states import Board, Ending, InvalidTransitionError

DUE = NOW + 900


def test_an_event_goes_one_way() -> None:
    """It starts when it is due or approved, and not before; it ends once; its identity is never used again."""
    board = states.scheduled(Board(), EVENT)
    with pytest.raises(InvalidTransitionError):
        states.started(board, ID, DUE - 0.1)
    assert states.started(board, ID, DUE).find(ID) is not None
    early = states.started(states.approved(board, ID.lower(), "WestNO_0"), ID, NOW)
    with pytest.raises(InvalidTransitionError):
        states.started(early, ID, NOW)
    over = states.ended(early, ID, NOW + 1, lasted_s=0.05)
    assert over.events == ()
    assert (over.ended[0].ending, over.ended[0].lasted_s) == (Ending.COMPLETED, 0.05)
    for step in (
        lambda: states.ended(over, ID, NOW),
        lambda: states.started(over, ID, DUE),
        lambda: states.scheduled(over, EVENT),
    ):
        with pytest.raises(InvalidTransitionError):
            step()
    assert states.ended(board, ID, NOW).ended[0].ending is Ending.CANCELLED


def test_the_first_voice_approves_an_event() -> None:
    """Of a machine that it names, or of another of the set; a second one, and one after the start, change nothing."""
    board = states.scheduled(Board(), replace(EVENT, resources=("a", "b")))
    assert states.approved(board, ID, "c").events[0].approved_by == "c"
    assert states.approved(board, OTHER, "b") == board
    first = states.approved(board, ID, "b")
    assert first.events[0].approved_by == "b"
    assert states.approved(first, ID, "a") == first
    begun = states.started(board, ID, DUE)
    assert states.approved(begun, ID, "a") == begun


def test_a_guest_that_is_silent_for_long_is_not_listening() -> None:
    """Nobody is told, so nobody is waited for; the numbers begin anew, and only then."""
    board = states.shown(Board(), b"x")
    assert states.listening(board, NOW, 0)
    assert not states.listening(board, NOW, 60)
    board = states.asked(board, NOW, 60)
    assert (board.incarnation, board.asked_s) == (1, NOW)
    assert states.listening(board, NOW + 60, 60)
    assert states.asked(board, NOW + 60, 60).incarnation == 1
    assert not states.listening(board, NOW + 60.1, 60)
    anew = states.asked(board, NOW + 60.1, 60)
    assert (anew.incarnation, states.shown(anew, b"x").incarnation) == (0, 1)
    assert states.asked(board, NOW + 1e6, 0).incarnation == 1
    assert states.merged(board, Board(asked_s=NOW - 5)).asked_s == NOW


def test_no_less_notice_than_azure_gives() -> None:
    """Where that is asked for; a guest that is not there to be told is not waited for."""
    least = {one: policy.granted_s(one, 1.0, minimum=True, listening=True) for one in states.EventType}
    assert least == {
        states.EventType.FREEZE: 900,
        states.EventType.REBOOT: 900,
        states.EventType.REDEPLOY: 600,
        states.EventType.PREEMPT: 30,
        states.EventType.TERMINATE: 300,
    }
    assert policy.granted_s(states.EventType.PREEMPT, 40.0, minimum=True, listening=True) == 40
    assert policy.granted_s(states.EventType.FREEZE, 1.0, minimum=False, listening=True) == 1
    assert policy.granted_s(states.EventType.FREEZE, 1.0, minimum=True, listening=False) == 0


def test_a_board_of_the_release_before_is_read() -> None:
    """It does not say when its guest asked last."""
    board = states.asked(states.scheduled(Board(), EVENT), NOW, 60)
    text = records.to_text(board)
    assert records.from_text(text) == board
    older = json.loads(text)
    del older["asked_s"]
    assert records.from_text(json.dumps(older)) == replace(board, asked_s=0.0)


def test_a_started_event_lingers_and_a_cancelled_one_does_not() -> None:
    """For as long as it is told to, with the same identity and status; then it is gone."""
    board = states.ended(states.started(states.scheduled(Board(), EVENT), ID, DUE), ID, DUE + 1)
    assert [event.id for event in states.listed(board, DUE + 2, 60)] == [ID]
    assert states.listed(board, DUE + 61, 60) == ()
    assert states.listed(board, DUE + 1, 0) == ()
    gone = states.ended(states.scheduled(Board(), EVENT), ID, NOW)
    assert states.listed(gone, NOW, 60) == ()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_se_21_the_number_grows_exactly_when_the_content_changes(steps: list[int]) -> None:
    """Also over a restart and a crossing: equal numbers are equal documents, and later ones are never smaller."""
    board, seen, last = Board(), dict[int, bytes](), 0
    clock = NOW
    for number, step in enumerate(steps):
        clock += 1000
        match step:
            case 0:
                board = states.scheduled(board, replace(EVENT, id=f"{number}", not_before_s=clock))
            case 1 if board.events and board.events[0].status is states.EventStatus.SCHEDULED:
                board = states.started(board, board.events[0].id, clock)
            case 2 if board.events:
                board = states.ended(board, board.events[0].id, clock)
            case 3:
                board = records.from_text(records.to_text(board))
            case 4:
                board = states.merged(Board(incarnation=number, shown="x"), board)
        array = document.content(board.events)
        before = board
        board = states.shown(board, array)
        assert states.shown(board, array) is board
        assert board.incarnation in (before.incarnation, before.incarnation + 1)
        assert seen.setdefault(board.incarnation, array) == array
        assert board.incarnation >= last
        last = board.incarnation


@pytest.mark.parametrize(("pause_s", "told"), [(0.0, 1), (0.3, 1), (1.0, 1), (1.1, 2), (60.0, 60)])
def test_se_25_a_pause_is_told_in_whole_seconds(pause_s: float, told: int) -> None:
    """Rounded up, and never 0, which would say that nothing is interrupted."""
    assert policy.expected_seconds(pause_s) == told


def test_a_board_survives_on_disk_and_a_damaged_one_is_put_aside(tmp_path: Path) -> None:
    """What was stored is read back; in place of what cannot be read comes a number above all that were shown."""
    files = BoardFiles(tmp_path / "events")
    assert files.load("m") == Board()
    board = states.ended(states.scheduled(Board(7, "x"), EVENT), ID, NOW, why="cancelled")
    files.store("m", board)
    before = files.stamp("m")
    assert files.load("m") == board
    assert files.machines() == ["m"]
    files.store("m", board)
    assert files.stamp("m") != before
    files.path("m").write_text("{")
    found = files.load("m")
    assert found.incarnation > 1_700_000_000
    assert files.path("m").with_suffix(".damaged").exists()
    assert files.load("m") == Board()


def test_what_a_machine_brings_is_taken_over(tmp_path: Path) -> None:
    """The event that moved it ended when it arrived, by the clock of this host; nonsense changes nothing."""
    files = BoardFiles(tmp_path)
    files.store(
        "m", replace(Board(3, "x"), ended=states.ended(states.scheduled(Board(), EVENT), ID, NOW).ended)
    )
    moved = states.scheduled(Board(9, "y"), replace(EVENT, id=OTHER, not_before_s=NOW))
    moved = states.ended(states.started(moved, OTHER, NOW), OTHER, NOW, why=ARRIVING)
    files.take("m", files.arriving("m", records.to_text(moved).encode()))
    found = files.load("m")
    assert (found.incarnation, found.shown) == (9, "y")
    assert [one.event.id for one in found.ended] == [ID, OTHER]
    assert found.ended[-1].ended_s > NOW
    for nonsense in (b"", b"{}", b"\xff", b"[" * 1000, b"x" * (records.MAX_BYTES + 1)):
        files.take("m", files.arriving("m", nonsense))
        assert files.load("m") == found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("incarnation",), -1),
        (("incarnation",), 1 << 63),
        (("incarnation",), True),
        (("shown",), None),
        (("events",), [{}]),
        (("events", 0, "status"), "Completed"),
        (("events", 0, "resources"), "WestNO_0"),
        (("events", 0, "duration_s"), 1.5),
        (("events", 0, "not_before_s"), 1e300),
        (("events", 0, "not_before_s"), float("nan")),
        (("events", 0, "description"), "x" * 2000),
    ],
)
def test_a_board_of_another_host_is_checked(path: tuple[str | int, ...], value: object) -> None:
    """Every value by type and range, before anything is shown to a guest."""
    said = json.loads(records.to_text(states.scheduled(Board(), EVENT)))
    place = said
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=r"\w"):
        records.from_text(json.dumps(said))
