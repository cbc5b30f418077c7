"""The demonstration's document never looks better than what happened."""

from __future__ import annotations

import json

import pytest

from tests.unit.cli.fake_source import HOST_A, HOST_B, MIB, TRACE_ID, migration
from vmferry.cli.demo_report import Crossing, Report
from vmferry.cli.demo_work import Sign, Watched
from vmferry.errors import ExitCode, HashMismatchError, NotConvergingError, OutcomeUnknownError
from vmferry.v1 import migration_pb2

MEMORY = 64 * MIB
COMPLETED = migration_pb2.MIGRATION_OUTCOME_COMPLETED


def test_a_good_demonstration() -> None:
    """With every proof there, the document says so and the exit code is 0."""
    report = _report(_crossing(), _crossing(verified=True))

    document = json.loads(json.dumps(report.document()))

    assert report.exit_code == ExitCode.OK
    assert document["outcome"] == "completed"
    assert document["memory_identical"] is True
    assert document["guest_ok"] is True
    assert (document["owner"], document["source"], document["destination"]) == (HOST_B, HOST_A, HOST_B)
    assert (document["downtime_ms"], document["total_ms"]) == (12.345, 2500.0)
    assert document["trace_id"] == TRACE_ID
    assert [crossing["verified"] for crossing in document["crossings"]] == [False, True]


def test_figures_of_several_crossings_are_the_median_of_the_measured_ones() -> None:
    """The crossing with the extra check, whose pause is long, does not count; the largest gap does."""
    report = _report(
        *(_crossing(downtime_ms=value, gap_ms=value) for value in (30, 10, 90)),
        _crossing(verified=True, downtime_ms=500),
    )

    document = report.document()

    assert document["downtime_ms"] == 30
    assert document["guest_gap_ms"] == 90


def test_the_worst_slowdown_is_told() -> None:
    """By what the guest counted before and meanwhile; a crossing of which it is not known does not count."""
    watched = Watched(Sign(10.0, 1000), Sign(11.0, 2000))
    assert watched.slowdown_percent(Sign(13.0, 3000)) == 50.0
    assert watched.slowdown_percent(Sign(13.0, 4200)) == -10.0
    found = _report(
        _crossing(slowdown=-10.0), _crossing(slowdown=50.0), _crossing(), _crossing(verified=True)
    )
    assert found.document()["guest_slowdown_percent"] == 50.0
    assert _report(_crossing()).document()["guest_slowdown_percent"] is None


@pytest.mark.parametrize(
    ("compared", "different"), [(MEMORY, 1), (MEMORY - 4096, 0), (0, 0), (None, 0)], ids=str
)
def test_memory_is_identical_only_if_all_of_it_was_compared(compared: int | None, different: int) -> None:
    """A page that differs, or was not compared, makes it false and the exit code that of an integrity failure."""
    report = _report(_crossing(), _crossing(verified=True, compared=compared, different=different))

    assert report.document()["memory_identical"] is False
    assert report.exit_code == ExitCode.INTEGRITY


def test_an_unwell_guest_is_told() -> None:
    """The guest's own complaint makes the exit code that of an integrity failure."""
    report = _report(_crossing(), _crossing(verified=True), guest_ok=False)

    assert report.document()["guest_ok"] is False
    assert report.exit_code == ExitCode.INTEGRITY


@pytest.mark.parametrize(
    ("outcome", "reason", "code", "name"),
    [
        (migration_pb2.MIGRATION_OUTCOME_FAILED, NotConvergingError("too fast"), ExitCode.FAILED, "failed"),
        (migration_pb2.MIGRATION_OUTCOME_FAILED, HashMismatchError("page 7"), ExitCode.INTEGRITY, "failed"),
        (
            migration_pb2.MIGRATION_OUTCOME_UNKNOWN,
            OutcomeUnknownError("no answer"),
            ExitCode.UNKNOWN,
            "unknown",
        ),
    ],
)
@pytest.mark.parametrize("before", [0, 1])
def test_a_crossing_that_did_not_complete_is_the_outcome(
    outcome: migration_pb2.MigrationOutcome.ValueType,
    reason: NotConvergingError,
    code: ExitCode,
    name: str,
    before: int,
) -> None:
    """Whatever completed before, the document's outcome is that of the crossing that did not."""
    broken = Crossing(migration(outcome=outcome, reason=reason), "a to b", verified=False)
    report = _report(*[_crossing()] * before, broken, guest_ok=False)

    document = json.loads(json.dumps(report.document()))

    assert (document["outcome"], document["reason"]) == (name, reason.reason)
    assert document["memory_identical"] is False
    assert document["downtime_ms"] == (12.345 if before else None)
    assert report.exit_code == code


def _report(*crossings: Crossing, guest_ok: bool = True) -> Report:
    return Report("canary", MEMORY, list(crossings), guest_ok=guest_ok)


def _crossing(
    *,
    verified: bool = False,
    compared: int | None = MEMORY,
    different: int = 0,
    downtime_ms: float | None = None,
    gap_ms: float = 1.0,
    slowdown: float | None = None,
) -> Crossing:
    made = migration(outcome=COMPLETED)
    if verified and compared is not None:
        made.verification.compared_bytes = compared
        made.verification.different_pages = different
    if downtime_ms is not None:
        made.downtime.FromMicroseconds(int(downtime_ms * 1000))
    return Crossing(made, "a to b", verified=verified, guest_gap_ms=gap_ms, guest_slowdown_percent=slowdown)
