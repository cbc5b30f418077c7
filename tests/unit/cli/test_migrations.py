"""The commands that talk to a source service, against a real server with a script instead of machines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from google.protobuf import json_format

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_source import (
    HOST_A,
    HOST_B,
    MACHINE_ID,
    MIB,
    MIGRATION_ID,
    FakeSource,
    migration,
    prediction,
)
from vmferry.cli import watch
from vmferry.errors import (
    CancelledByCallerError,
    ExitCode,
    HashMismatchError,
    IncompatibleError,
    NotConvergingError,
    OutcomeUnknownError,
    PeerUnreachableError,
    ServiceStoppingError,
    VmferryError,
)
from vmferry.telemetry.spans import load_spans
from vmferry.v1 import compatibility_pb2, migration_pb2

COMPLETED = migration_pb2.MIGRATION_OUTCOME_COMPLETED
FAILED = migration_pb2.MIGRATION_OUTCOME_FAILED
CANCELLED = migration_pb2.MIGRATION_OUTCOME_CANCELLED
UNKNOWN = migration_pb2.MIGRATION_OUTCOME_UNKNOWN
HANDING_OFF = migration_pb2.MIGRATION_PHASE_HANDING_OFF

MOVE = ("migrate", "web-1", "--to-host", HOST_B, "--to-address", "127.0.0.1:7602")


def test_migrate_prints_one_document_that_protobuf_reads_back(call: Run, source: FakeSource) -> None:
    """With --json stdout is the final migration, in protobuf's JSON with numbers, and nothing else."""
    final = migration(outcome=COMPLETED)
    source.script = [migration(), final]

    ran = call(*MOVE, "--json")

    assert ran.code == ExitCode.OK, ran.err
    document = json.loads(ran.out)
    assert document["progress"]["memory_bytes"] == 64 * MIB
    assert document["outcome"] == "MIGRATION_OUTCOME_COMPLETED"
    assert json_format.ParseDict(document, migration_pb2.Migration()) == final
    assert "precopying, round 1" in ran.err


def test_migrate_sends_a_ticket_for_exactly_this_crossing(call: Run, source: FakeSource) -> None:
    """The ticket names machine, source and destination; options not given are left to the service."""
    source.script = [migration(outcome=COMPLETED)]

    limits = ("--downtime-limit-ms", 1250, "--reconnect-timeout", 2.5)
    assert call(*MOVE, *limits, "--lanes", 2).code == ExitCode.OK

    (ticket,) = source.tickets
    assert (ticket.machine_id, ticket.source.uri, ticket.destination.uri) == (MACHINE_ID, HOST_A, HOST_B)
    options = source.requests[-1].options
    assert options.downtime_limit.ToMilliseconds() == 1250
    assert options.reconnect_timeout.ToMilliseconds() == 2500
    assert options.lanes == 2
    assert options.verify == migration_pb2.VERIFY_MODE_UNSPECIFIED
    assert not options.tracker
    assert not options.path
    assert not options.HasField("total_timeout")


def test_migrate_passes_on_checks_and_tracker(call: Run, source: FakeSource) -> None:
    """--verify bytes and --tracker arrive at the service as such."""
    source.script = [migration(outcome=COMPLETED)]

    assert call(*MOVE, "--verify", "bytes", "--tracker", "hash").code == ExitCode.OK

    options = source.requests[-1].options
    assert (options.verify, options.tracker) == (migration_pb2.VERIFY_MODE_BYTES, "hash")


@pytest.mark.parametrize("command", [MOVE, ("plan", *MOVE[1:])], ids=["migrate", "plan"])
@pytest.mark.parametrize("path", ["direct", "stream"])
def test_the_way_is_passed_on(call: Run, source: FakeSource, command: tuple[str, ...], path: str) -> None:
    """--path arrives at the service as such."""
    source.script = [migration(outcome=COMPLETED)]
    assert call(*command, "--path", path).code == ExitCode.OK
    assert source.requests[-1].options.path == path


def test_migrate_is_part_of_one_trace(call: Run, source: FakeSource, tmp_path: Path) -> None:
    """With a folder for spans, the call that starts a migration carries the trace of the span written there."""
    source.script = [migration(outcome=COMPLETED)]

    # Recording is set up once in the life of a process, so this needs one of its own.
    command = [sys.executable, "-m", "vmferry.cli.main", *MOVE, "--trace-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)

    (traceparent,) = source.traceparents
    spans = load_spans([tmp_path], traceparent.split("-")[1])
    assert spans[0].name == "schedule"
    assert {span.service for span in spans} == {"scheduler"}


def test_migrate_repeats_a_start_whose_answer_was_lost(call: Run, source: FakeSource) -> None:
    """The same request_id and ticket go out again, so that nothing is started twice."""
    source.script = [migration(outcome=COMPLETED)]
    source.lost_answers = 2
    request_id = str(uuid.uuid4())

    ran = call(*MOVE, "--request-id", request_id)

    assert ran.code == ExitCode.OK, ran.err
    assert [request.request_id for request in source.requests] == [request_id] * 3
    assert len({request.ticket for request in source.requests}) == 1


def test_migrate_says_how_to_ask_again_when_every_answer_is_lost(call: Run, source: FakeSource) -> None:
    """Whether it was started is not known: exit code 5, and the request to repeat."""
    source.lost_answers = 1000

    ran = call(*MOVE)

    assert ran.code == ExitCode.UNREACHABLE
    assert f"--request-id {source.requests[0].request_id}" in ran.err
    assert not ran.out


def test_an_interrupted_migrate_leaves_the_migration_alone(call: Run, source: FakeSource) -> None:
    """Ctrl-C ends the watching with exit code 130, and says how to watch on or cancel."""
    source.script = [migration()]  # and nothing more: it is watched until the signal

    command = [sys.executable, "-m", "vmferry.cli.main", *MOVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "precopying" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)

    assert (process.returncode, out) == (130, "")
    assert f"vmferry watch {MIGRATION_ID}, or vmferry cancel {MIGRATION_ID}" in err
    assert "Traceback" not in err


def test_migrate_no_wait_returns_the_id(call: Run, source: FakeSource) -> None:
    """Without waiting stdout is the migration's id, and the migration is not watched."""
    ran = call(*MOVE, "--no-wait")

    assert (ran.code, ran.out) == (ExitCode.OK, f"{MIGRATION_ID}\n")


@pytest.mark.parametrize(
    ("outcome", "reason", "code"),
    [
        (COMPLETED, None, ExitCode.OK),
        (FAILED, NotConvergingError("the guest writes too fast"), ExitCode.FAILED),
        (CANCELLED, CancelledByCallerError("cancelled"), ExitCode.CANCELLED),
        (FAILED, IncompatibleError("no common protocol"), ExitCode.PRECONDITION),
        (FAILED, PeerUnreachableError("the destination is away"), ExitCode.UNREACHABLE),
        (FAILED, HashMismatchError("page 7"), ExitCode.INTEGRITY),
        (FAILED, None, ExitCode.FAILED),
    ],
)
def test_watch_ends_with_the_outcomes_exit_code(
    call: Run, source: FakeSource, outcome: int, reason: VmferryError | None, code: ExitCode
) -> None:
    """Each outcome and reason has the exit code of docs/cli.md, and the reason is told with its remedy."""
    source.script = [migration(), migration(outcome=outcome, reason=reason)]  # type: ignore[arg-type]

    ran = call("watch", MIGRATION_ID)

    assert ran.code == code, ran.err
    if reason is not None:
        assert reason.reason in ran.err
        assert reason.instance_remedy in ran.err


@pytest.mark.parametrize("command", [("watch", MIGRATION_ID), MOVE], ids=["watch", "migrate"])
def test_an_outcome_that_stays_unknown_is_called_so(
    call: Run, source: FakeSource, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Exit code 6 and the document that says unknown, whoever waits; never a guess in either direction."""
    _be_impatient(monkeypatch)
    unknown = OutcomeUnknownError("no answer to Go")
    source.script = [
        migration(phase=HANDING_OFF),
        migration(phase=HANDING_OFF, outcome=UNKNOWN, reason=unknown),
    ]

    ran = call(*command, "--json")

    assert ran.code == ExitCode.UNKNOWN
    assert json.loads(ran.out)["outcome"] == "MIGRATION_OUTCOME_UNKNOWN"


def test_an_unknown_outcome_names_what_to_type(
    call: Run, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads it at night is told which command shows both hosts."""
    _be_impatient(monkeypatch)
    source.script = [migration(phase=HANDING_OFF, outcome=UNKNOWN, reason=OutcomeUnknownError("no answer"))]

    ran = call("watch", MIGRATION_ID)

    assert ran.code == ExitCode.UNKNOWN
    assert "vmferry recover web-1" in ran.err


def test_watch_waits_for_an_unknown_outcome_to_resolve(call: Run, source: FakeSource) -> None:
    """An outcome that becomes known in time is the one reported."""
    source.script = [migration(phase=HANDING_OFF, outcome=UNKNOWN), migration(outcome=COMPLETED)]

    assert call("watch", MIGRATION_ID).code == ExitCode.OK


def test_watch_takes_up_a_lost_connection(call: Run, source: FakeSource) -> None:
    """A stream that breaks, even twice, is opened again and the migration followed to its end."""
    away = ServiceStoppingError("the service is stopping")
    source.script = [migration(), away, away, migration(current_round=2), migration(outcome=COMPLETED)]

    ran = call("watch", MIGRATION_ID)

    assert ran.code == ExitCode.OK, ran.err
    assert "connection to the source is lost" in ran.err
    assert "round 2" in ran.err


def test_watch_does_not_wait_for_ever_for_a_lost_source(
    call: Run, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that stays away ends the command with exit code 5, and says that the migration may go on."""
    _be_impatient(monkeypatch)
    source.script = [migration(), *[ServiceStoppingError("the service is stopping")] * 1000]

    ran = call("watch", MIGRATION_ID)

    assert ran.code == ExitCode.UNREACHABLE
    assert f"vmferry watch {MIGRATION_ID}" in ran.err


def test_watch_prints_a_line_for_each_change_only(call: Run, source: FakeSource) -> None:
    """In a pipe, the same phase and round is not repeated at every message."""
    source.script = [
        *[migration(remaining=left * MIB) for left in range(40, 0, -1)],
        migration(current_round=2),
        migration(outcome=COMPLETED),
    ]

    lines = call("watch", MIGRATION_ID).err.splitlines()

    assert len(lines) == 3
    assert lines[0] == (
        "web-1: precopying, round 1: sent 24.0 MiB, remaining 40.0 MiB, rate 400.0 MiB/s, dirty 20.0 MiB/s, "
        "expected downtime 12 ms, ETA 1.4 s"
    )


def test_status_prints_the_migration(call: Run, source: FakeSource) -> None:
    """As text and as a document, status is exit code 0 whatever came of the migration."""
    source.migrations = [migration(outcome=FAILED, reason=NotConvergingError("the guest writes too fast"))]

    text, document = call("status", MIGRATION_ID), call("status", MIGRATION_ID, "--json")

    assert (text.code, document.code) == (ExitCode.OK, ExitCode.OK)
    assert "NOT_CONVERGING: the guest writes too fast" in text.out
    assert json.loads(document.out)["reason"]["reason"] == "NOT_CONVERGING"


def test_list_goes_through_all_pages(call: Run, source: FakeSource) -> None:
    """All migrations are printed, from however many pages they came."""
    ran = call("list", "--machine", "web-1", "--json")

    assert len(json.loads(ran.out)["migrations"]) == 2
    assert [request.machine for request in source.requests] == ["web-1"] * 2


def test_list_open_only(call: Run, source: FakeSource) -> None:
    """--open leaves out what has ended."""
    (only,) = json.loads(call("list", "--open", "--json").out)["migrations"]

    assert only["outcome"] == "MIGRATION_OUTCOME_UNSPECIFIED"


def test_list_machines(call: Run, source: FakeSource) -> None:
    """--machines prints the machines of the source's host, as a table and as a document."""
    (machine,) = json.loads(call("list", "--machines", "--json").out)["machines"]

    assert (machine["name"], machine["epoch"], machine["pid"]) == ("web-1", 1, 4711)
    assert "web-1  running  owned  64 MiB" in call("list", "--machines").out


def test_an_empty_list_leaves_stdout_empty(call: Run, source: FakeSource) -> None:
    """That there is nothing is said on stderr; as a document it is an empty list."""
    source.migrations = []

    ran = call("list")

    assert (ran.out, ran.err) == ("", "no migrations\n")
    assert json.loads(call("list", "--json").out) == {"migrations": []}


def test_cancel(call: Run, source: FakeSource) -> None:
    """A cancelled migration is printed; one past the point of no return is refused with exit code 4."""
    assert json.loads(call("cancel", MIGRATION_ID, "--json").out)["id"] == MIGRATION_ID
    source.migrations = [migration(phase=HANDING_OFF)]

    refused = call("cancel", MIGRATION_ID)

    assert refused.code == ExitCode.PRECONDITION
    assert "POINT_OF_NO_RETURN" in refused.err


def test_cancelling_or_switching_what_has_ended_says_what_is_true(call: Run, source: FakeSource) -> None:
    """Never that a machine stays which has gone: exit code 4 then; one that was cancelled before is well, again."""
    source.migrations = [migration(phase=migration_pb2.MIGRATION_PHASE_ENDED, outcome=COMPLETED)]
    source.migrations[0].owner = HOST_B
    for command in ("cancel", "switch-now"):
        ran = call(command, MIGRATION_ID)
        assert f"has ended before, completed: web-1 belongs to {HOST_B}" in ran.err
        assert "stays" not in ran.err
        assert ran.code == (ExitCode.PRECONDITION if command == "cancel" else ExitCode.OK)

    source.migrations = [
        migration(
            phase=migration_pb2.MIGRATION_PHASE_ENDED,
            outcome=CANCELLED,
            reason=CancelledByCallerError("by jane"),
        )
    ]
    source.migrations[0].owner = HOST_A
    ran = call("cancel", MIGRATION_ID)
    assert f"has ended before, cancelled (CANCELLED): web-1 belongs to {HOST_A}" in ran.err
    assert ran.code == ExitCode.OK


def test_switching_what_has_paused_says_so(call: Run, source: FakeSource) -> None:
    """There is no round to wait for any more."""
    source.migrations = [migration(phase=HANDING_OFF)]
    assert "its guest is paused for the switch already" in call("switch-now", MIGRATION_ID).err


def test_plan_prints_the_whole_report(call: Run, source: FakeSource) -> None:
    """A report that blocks is printed whole and ends with exit code 4; one that does not with 0."""
    arguments = ("plan", "web-1", *MOVE[2:])
    assert call(*arguments).out == "could move: no findings; protocol version 1, tracker pagemap-scan\n"
    source.report.compatible = False
    for name in ("memory.insufficient", "name.taken"):
        source.report.items.add(
            severity=compatibility_pb2.SEVERITY_BLOCKS,
            id=name,
            message="it blocks",
            object="b",
            remedy="remove it",
        )

    ran = call(*arguments, "--json")

    assert ran.code == ExitCode.PRECONDITION
    assert [item["id"] for item in json.loads(ran.out)["items"]] == ["memory.insufficient", "name.taken"]


def test_plan_groups_what_it_found_by_how_much_it_matters(call: Run, source: FakeSource) -> None:
    """What blocks comes first, each with name, object, words and remedy on lines that no other host can forge."""
    source.report.compatible = False
    for severity, name, remedy in (
        (compatibility_pb2.SEVERITY_NOTE, "kernel.differs", ""),
        (compatibility_pb2.SEVERITY_WARNS, "host.cpus", "a larger one"),
        (compatibility_pb2.SEVERITY_BLOCKS, "host.full", "wait"),
    ):
        message = f"about {name}\nand more\x1b[2J"
        source.report.items.add(severity=severity, id=name, message=message, object="b", remedy=remedy)

    ran = call("plan", "web-1", *MOVE[2:])

    assert ran.code == ExitCode.PRECONDITION
    assert ran.out.splitlines() == [
        "cannot move: 1 blocks, 1 warns, 1 note; protocol version 1, tracker pagemap-scan",
        "",
        "blocks  host.full  (b)",
        "    about host.full and more\N{REPLACEMENT CHARACTER}[2J",
        "    do: wait",
        "",
        "warns  host.cpus  (b)",
        "    about host.cpus and more\N{REPLACEMENT CHARACTER}[2J",
        "    do: a larger one",
        "",
        "note  kernel.differs  (b)",
        "    about kernel.differs and more\N{REPLACEMENT CHARACTER}[2J",
    ]


def test_plan_prints_what_is_predicted(call: Run, source: FakeSource) -> None:
    """Times with their bounds and the rates with their errors, or the whole message as a document."""
    arguments = ("plan", "web-1", *MOVE[2:])
    assert "total" not in call(*arguments).out
    source.report.prediction.CopyFrom(prediction())

    lines = call(*arguments).out.splitlines()

    assert lines[1:5] == [
        "total      2.00 s (1.50 s to 3.00 s), in 4 rounds",
        "downtime   40 ms (30 ms to 60 ms)",
        "guest      writes 20.0 MiB/s \N{PLUS-MINUS SIGN} 1.0 MiB/s (over 500 ms), holds 64.0 MiB",
        "link       takes 400.0 MiB/s \N{PLUS-MINUS SIGN} 10.0 MiB/s; memory is made at 2.0 GiB/s",
    ]
    document = json.loads(call(*arguments, "--json").out)
    assert json_format.ParseDict(document, compatibility_pb2.CompatibilityReport()) == source.report
    source.report.prediction.converges = False
    assert "it would not converge" in call(*arguments).out
    assert [request.without_prediction for request in source.requests] == [False] * 4


def test_plan_can_do_without_a_prediction(call: Run, source: FakeSource) -> None:
    """--no-prediction reaches the source."""
    call("plan", "web-1", *MOVE[2:], "--no-prediction")
    assert source.requests[-1].without_prediction


def test_status_shows_what_was_predicted(call: Run, source: FakeSource) -> None:
    """Beside what then happened, as far as it has happened."""
    done = migration(outcome=COMPLETED)
    done.prediction.CopyFrom(prediction())
    done.end_time.FromJsonString("2026-11-20T10:00:02.5Z")
    source.migrations = [done]

    out = call("status", MIGRATION_ID).out

    assert "predicted   total 2.00 s (1.50 s to 3.00 s); it took 2.50 s\n" in out
    assert "            downtime 40 ms (30 ms to 60 ms); it was 12 ms\n" in out
    done.ClearField("end_time")
    done.ClearField("downtime")
    done.prediction.converges = False
    out = call("status", MIGRATION_ID).out
    assert "total 2.00 s (1.50 s to 3.00 s), not converging\n" in out
    assert "it was" not in out


def _be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE", watch.Patience(reconnect_s=0.2, unknown_s=0.2, retry_s=0.02))
