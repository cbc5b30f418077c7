"""Bad input at every option and argument gets an error that names it, an exit code, and nothing on stdout."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Ran, Run
from tests.unit.cli.fake_source import HOST_A, HOST_B, MIGRATION_ID, FakeSource
from vmferry.cli import main
from vmferry.errors import ExitCode

TO = ("--to-host", HOST_B, "--to-address", "127.0.0.1:7602")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("migrate", "web-1", *TO, "--lanes", "1"), "--lanes"),
        (("migrate", "web-1", *TO, "--lanes", "17"), "--lanes"),
        (("migrate", "web-1", *TO, "--lanes", "-4"), "--lanes"),
        (("migrate", "web-1", *TO, "--lanes", "many"), "--lanes"),
        (("migrate", "web-1", *TO, "--downtime-limit-ms", "0"), "--downtime-limit-ms"),
        (("migrate", "web-1", *TO, "--downtime-limit-ms", "-1"), "--downtime-limit-ms"),
        (("migrate", "web-1", *TO, "--verify", "eyes"), "--verify"),
        (("migrate", "web-1", *TO, "--tracker", "guess"), "--tracker"),
        (("migrate", "web-1", *TO, "--path", "by-air"), "--path"),
        (("demo", "--path", "stream"), "--path"),
        (("migrate", "web-1", *TO, "--request-id", "again"), "--request-id"),
        (("migrate", "web-1", "--to-host", HOST_B), "--to-address"),
        (("migrate", "web-1", "--to-address", "127.0.0.1:7602"), "--to-host"),
        (("migrate", "web-1", "--to-host", HOST_B, "--to-address", "127.0.0.1"), "--to-address"),
        (("migrate", "web-1", "--to-host", HOST_B, "--to-address", "127.0.0.1:0"), "--to-address"),
        (("migrate", "web-1", "--to-host", HOST_B, "--to-address", "unix:/run/x.sock"), "--to-address"),
        (("migrate", "web-1", "--to-host", "host-b", "--to-address", "b:1"), "--to-host"),
        (
            ("migrate", "web-1", "--to-host", "spiffe://test.example/admin/b", "--to-address", "b:1"),
            "--to-host",
        ),
        (("migrate", *TO), "MACHINE"),
        (("watch",), "MIGRATION"),
        (("list", "--machines", "--open"), "--machines"),
        (("list", "--everything"), "--everything"),
        (("ferry",), "ferry"),
        (("demo", "--memory-mib", "0"), "--memory-mib"),
        (("demo", "--memory-mib", "64", "--resident-mib", "64"), "--resident-mib"),
        (("demo", "--memory-mib", "64", "--resident-mib", "63", "--dirty-mib-per-s", "1"), "--resident-mib"),
        (("demo", "--lanes", "1"), "--lanes"),
        (("demo", "--dirty-mib-per-s", "-5"), "--dirty-mib-per-s"),
        (("demo", "--repeat", "0"), "--repeat"),
        (("demo", "--keep", "/proc/1/nowhere"), "--keep"),
        (("playground", "--dir", "/proc"), "--dir"),
        (("demo", "--memory-mib", "1048576"), "--memory-mib"),
    ],
)
def test_a_wrong_option_is_named(call: Run, arguments: tuple[str, ...], culprit: str) -> None:
    """Usage errors are exit code 2 (4 where this computer is at fault) and name the option."""
    ran = call(*arguments)

    assert ran.code in (ExitCode.USAGE, ExitCode.PRECONDITION), ran.err
    assert culprit in ran.err
    assert ran.err.startswith("vmferry: error: ")
    assert not ran.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("migrate", "no-such", *TO), "MACHINE_NOT_FOUND"),
        (("plan", "no-such", *TO), "MACHINE_NOT_FOUND"),
        (("status", "0" * 32), "MIGRATION_NOT_FOUND"),
        (("watch", "0" * 32), "MIGRATION_NOT_FOUND"),
        (("cancel", "0" * 32), "MIGRATION_NOT_FOUND"),
    ],
)
def test_what_the_service_refuses_is_told(call: Run, arguments: tuple[str, ...], reason: str) -> None:
    """A refusal of the service comes out with its reason, its remedy and exit code 4."""
    ran = call(*arguments)

    assert ran.code == ExitCode.PRECONDITION, ran.err
    assert f"reason: {reason}" in ran.err
    assert "remedy: " in ran.err
    assert not ran.out


@pytest.mark.parametrize("missing", ["ca.pem", "tls.crt", "tls.key", "ticket.crt", "ticket.key"])
def test_a_missing_certificate_is_named(call: Run, certificates: Path, tmp_path: Path, missing: str) -> None:
    """Each file that --tls DIR must hold is named when it is not there."""
    own = shutil.copytree(certificates / "operator", tmp_path / "tls")
    (own / missing).unlink()

    ran = call("migrate", "web-1", *TO, "--tls", own)

    _assert_refused(ran, ExitCode.USAGE, missing)


def test_a_missing_folder_of_certificates_is_named(call: Run) -> None:
    """--tls with a folder that does not exist says which."""
    _assert_refused(call("list", "--tls", "/nowhere"), ExitCode.USAGE, "/nowhere")


@pytest.mark.parametrize("name", ["source", "source-host", "tls"])
def test_the_connection_has_no_silent_default(call: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is neither an option nor in the environment is asked for by name."""
    monkeypatch.delenv(f"VMFERRY_{name}".upper().replace("-", "_"))

    _assert_refused(call("list"), ExitCode.USAGE, f"--{name}")


@pytest.mark.parametrize("address", ["host", "host:", "host:0", "host:65536", ":7601", "unix:/x", "a b:1"])
def test_a_malformed_source_is_named(call: Run, address: str) -> None:
    """--source takes HOST:PORT and nothing else."""
    _assert_refused(call("list", "--source", address), ExitCode.USAGE, "--source")


def test_a_malformed_source_host_is_named(call: Run) -> None:
    """--source-host takes the URI of a host and nothing else."""
    for uri in ("a", "spiffe://test.example/admin/operator", "https://test.example/vmhost/a"):
        _assert_refused(call("list", "--source-host", uri), ExitCode.USAGE, "--source-host")


def test_another_host_at_the_address_is_refused(call: Run) -> None:
    """A service with a good certificate of another host is not talked to."""
    ran = call("list", "--source-host", "spiffe://test.example/vmhost/other")

    _assert_refused(ran, ExitCode.PRECONDITION, "reason: PEER_IDENTITY")


def test_nobody_at_the_address(call: Run) -> None:
    """A source that cannot be reached is exit code 5, for a call and for a watch that never began."""
    with socket.socket() as held:  # bound and not listening: nobody else can come to answer there
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"

        for arguments in (("list",), ("watch", MIGRATION_ID)):
            ran = call(*arguments, "--source", address)
            _assert_refused(ran, ExitCode.UNREACHABLE, "reason: PEER_UNREACHABLE")


def test_a_hosts_certificate_cannot_sign_tickets(call: Run, certificates: Path) -> None:
    """A folder without a ticket key can look, but not start a migration."""
    assert call("list", "--tls", certificates / "a", "--json").code == ExitCode.OK

    _assert_refused(call("migrate", "web-1", *TO, "--tls", certificates / "a"), ExitCode.USAGE, "ticket.crt")


def test_a_ticket_to_the_source_itself_is_refused(call: Run) -> None:
    """A machine cannot be sent to the host it is on."""
    ran = call("migrate", "web-1", "--to-host", HOST_A, "--to-address", "127.0.0.1:7602")

    _assert_refused(ran, ExitCode.USAGE, "the same host")


def test_the_terminal_cannot_be_commanded_by_another_host(
    call: Run, source: FakeSource, capfd: pytest.CaptureFixture[str]
) -> None:
    """Control characters in another host's words do not reach the terminal."""
    ran = call("migrate", "\x1b[2Jno-such", *TO)

    assert ran.code == ExitCode.PRECONDITION
    assert "\x1b" not in ran.err


def test_no_arguments_show_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    """Called without anything, the command explains itself and ends with the code of a usage error."""
    code = main.run([])

    assert code == ExitCode.USAGE
    assert "migrate" in "".join(capfd.readouterr())


def test_debug_shows_the_traceback_and_nothing_else_does(call: Run) -> None:
    """A traceback is shown when asked for, and only then."""
    assert "Traceback" not in call("list", "--tls", "/nowhere").err
    assert "Traceback" in call("--debug", "list", "--tls", "/nowhere").err


def _assert_refused(ran: Ran, code: ExitCode, words: str) -> None:
    assert ran.code == code, ran.err
    assert words in ran.err
    assert not ran.out
