"""``vmferry recover`` against services that say what a test wants: whom it asks, what it prints, and how it ends."""

# ruff: noqa: N802 - names and parameters of a servicer's methods are gRPC's
from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_source import HOST_A, MACHINE_ID, MIGRATION_ID
from vmferry.errors import ExitCode, MachineNotFoundError
from vmferry.rpc.status import to_grpc_status
from vmferry.security.tls import SERVER_OPTIONS, TlsFiles, server_credentials
from vmferry.v1 import handoff_pb2, journal_pb2, machine_pb2, recovery_pb2
from vmferry.v1.recovery_pb2_grpc import RecoveryServiceServicer, add_RecoveryServiceServicer_to_server

OTHER = "spiffe://test.example/vmhost/other"


class FakeHost(RecoveryServiceServicer):
    """A host's service that says what it is told to, and notes what it was asked."""

    def __init__(self, tls_dir: Path, uri: str) -> None:
        self.seen = inspection(uri)
        self.after: machine_pb2.Blockage | None = None
        """What blocks the machine once it was settled."""
        self.done: list[str] = []
        self.calls: list[str] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=SERVER_OPTIONS)
        add_RecoveryServiceServicer_to_server(self, self._server)
        port = self._server.add_secure_port("127.0.0.1:0", server_credentials(TlsFiles(tls_dir)))
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def close(self) -> None:
        """End it."""
        self._server.stop(0).wait()

    def InspectMachine(self, request: Any, context: Any) -> Any:
        self._find("inspect", request.machine, context)
        return recovery_pb2.InspectMachineResponse(inspection=self.seen)

    def SettleMachine(self, request: Any, context: Any) -> Any:
        self._find("settle", request.machine, context)
        self.seen.machine.ClearField("blockage")
        if self.after is not None:
            self.seen.machine.blockage.CopyFrom(self.after)
        done, self.done = self.done, []
        return recovery_pb2.SettleMachineResponse(done=done, inspection=self.seen)

    def _find(self, what: str, name: str, context: Any) -> None:
        self.calls.append(f"{what} {name}")
        if name not in ("web-1", MACHINE_ID):
            context.abort_with_status(to_grpc_status(MachineNotFoundError(f"no machine {name!r}")))


def inspection(uri: str) -> recovery_pb2.MachineInspection:
    """A machine that was handed off, as its source would tell."""
    seen = recovery_pb2.MachineInspection(
        machine=machine_pb2.Machine(
            name="web-1",
            uuid=MACHINE_ID,
            state=machine_pb2.MACHINE_STATE_PAUSED,
            right=machine_pb2.MACHINE_RIGHT_HANDED_OFF,
            blockage=blockage("OUTCOME_UNKNOWN"),
        ),
        host=uri,
        service="source",
        hypervisor="paused",
        attempt_state="handed-off",
        journals=[recovery_pb2.Journal(role="source", exists=True)],
        choices=[
            recovery_pb2.Choice(name="wait", possible=True, risk="none " * 40, command="vmferry watch X"),
            recovery_pb2.Choice(name="cancel", why_not="it is too late", command="vmferry cancel X"),
        ],
    )
    ref = handoff_pb2.AttemptRef(
        migration_id=bytes.fromhex(MIGRATION_ID), attempt=1, source=HOST_A, destination=OTHER
    )
    seen.open_attempt.CopyFrom(ref)
    seen.journals[0].records.append(
        journal_pb2.JournalRecord(kind=journal_pb2.RECORD_KIND_BEGUN, attempt=ref, note="\x1b[2Jnight " * 30)
    )
    return seen


def blockage(reason: str) -> machine_pb2.Blockage:
    """Why a machine is blocked."""
    return machine_pb2.Blockage(reason=reason, message="it is so", remedy="Do something.")


@pytest.fixture
def here(certificates: Path) -> Iterator[FakeHost]:
    """The service of host a."""
    fake = FakeHost(certificates / "a", HOST_A)
    yield fake
    fake.close()


@pytest.fixture
def there(certificates: Path) -> Iterator[FakeHost]:
    """The service of the other host."""
    fake = FakeHost(certificates / "other", OTHER)
    fake.seen.machine.blockage.reason = "AWAITS_SOURCE"
    yield fake
    fake.close()


@pytest.fixture
def ask(run: Run, here: FakeHost, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line with host a in the environment."""
    monkeypatch.setenv("VMFERRY_SOURCE", here.address)
    monkeypatch.setenv("VMFERRY_SOURCE_HOST", HOST_A)
    monkeypatch.setenv("VMFERRY_TLS", str(certificates / "operator"))
    return run


def test_both_ends_are_asked_and_settled(ask: Run, here: FakeHost, there: FakeHost) -> None:
    """The journal says where the other end is; it is asked by the machine's identity; one document tells of both."""
    here.seen.peer.host, here.seen.peer.address = OTHER, there.address
    here.done, there.done = ["asked"], ["resumed"]
    ran = ask("recover", "web-1", "--json")
    assert ran.code == ExitCode.OK, ran.out + ran.err
    document = json.loads(ran.out)
    assert (document["blocked"], document["exit_code"]) == (False, 0)
    assert [end["done"] for end in document["ends"]] == [["asked"], ["resumed"]]
    for end, host in zip(document["ends"], (here, there), strict=True):
        assert json_format.ParseDict(end["inspection"], recovery_pb2.MachineInspection()) == host.seen
    assert here.calls[0] == "inspect web-1"
    assert "settle " + MACHINE_ID in there.calls


def test_only_showing_settles_nothing(ask: Run, here: FakeHost, there: FakeHost) -> None:
    """--show asks both and changes neither."""
    ran = ask("recover", "web-1", "--show", "--peer", there.address, "--peer-host", OTHER)
    assert ran.code == ExitCode.UNKNOWN
    assert not [call for call in (*here.calls, *there.calls) if "settle" in call]
    assert "AWAITS_SOURCE" in ran.out


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("", ExitCode.OK),
        ("OUTCOME_UNKNOWN", ExitCode.UNKNOWN),
        ("JOURNAL_DAMAGED", ExitCode.UNKNOWN),
        ("SOMETHING_NEW", ExitCode.UNKNOWN),
        ("NOT_RESUMED", ExitCode.FAILED),
    ],
)
def test_the_exit_code_says_what_is_still_blocked(
    ask: Run, here: FakeHost, reason: str, code: ExitCode
) -> None:
    """6 for whatever is not known, also for reasons of a newer service; 1 if only a hypervisor is in the way."""
    here.after = blockage(reason) if reason else None
    assert ask("recover", "web-1").code == code


def test_the_text_is_for_a_person_at_night(ask: Run, here: FakeHost) -> None:
    """It fits 100 columns, commands stand alone, the unreachable end is named, and nothing commands the terminal."""
    here.seen.peer.host = OTHER
    ran = ask("recover", "web-1", "--show")
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.strip() == "$ vmferry watch X" for line in lines)
    assert any("cancel" in line and "not now: it is too late" in line for line in lines)
    assert "--peer" in ran.out
    assert "\x1b" not in ran.out


def test_an_end_that_does_not_answer_is_no_failure(ask: Run, here: FakeHost) -> None:
    """What this host knows is shown all the same, with the reason why the other one was not asked."""
    here.seen.peer.host, here.seen.peer.address = OTHER, "127.0.0.1:1"
    ran = ask("recover", "web-1", "--json")
    assert ran.code == ExitCode.OK  # nothing blocks it here once it was settled
    assert json.loads(ran.out)["ends"][1]["error"]["reason"] == "PEER_UNREACHABLE"


def test_somebody_elses_certificate_is_not_asked(ask: Run, here: FakeHost, there: FakeHost) -> None:
    """The other end must be the one that the attempt names."""
    here.seen.peer.host, here.seen.peer.address = "spiffe://test.example/vmhost/b", there.address
    ran = ask("recover", "web-1", "--show", "--json")
    assert json.loads(ran.out)["ends"][1]["error"]["reason"] == "PEER_IDENTITY"
    assert there.calls == []


def test_a_machine_that_is_not_there_is_not_found(ask: Run, here: FakeHost) -> None:
    """The catalogue's error and code, and no document."""
    ran = ask("recover", "nobody", "--json")
    assert (ran.code, ran.out) == (ExitCode.PRECONDITION, "")
    assert "MACHINE_NOT_FOUND" in ran.err


def test_it_must_be_said_whom_to_ask(run: Run, tmp_path: Path) -> None:
    """Without a service or a configuration there is nobody; the way without a service is named."""
    ran = run("recover", "web-1")
    assert ran.code == ExitCode.USAGE
    assert "--source" in ran.err
    assert "--config" in ran.err
    assert run("recover", "web-1", "--config", tmp_path / "none.toml").code == ExitCode.USAGE
    assert run("recover", "web-1", "--peer", "nowhere").code == ExitCode.USAGE


def test_a_host_without_journals_has_nothing_to_show(run: Run, tmp_path: Path) -> None:
    """Reading makes no journals, no register and no folder."""
    file = tmp_path / "host.toml"
    file.write_text('state_dir = "state"\nrun_dir = "run"\nram_dir = "ram"\n')
    assert run("recover", "web-1", "--config", file).code == ExitCode.PRECONDITION
    assert list(tmp_path.iterdir()) == [file]
