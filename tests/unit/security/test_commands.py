"""The commands that make certificates and tickets, as a person types them."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.unit.security.crafting import CONTROLLER, HOST_A, HOST_B
from vmferry.cli import certs
from vmferry.cli.ticket import ticket
from vmferry.errors import ConfigError, InvalidArgumentError, VmferryError
from vmferry.security.material import TlsFiles
from vmferry.security.tickets import open_ticket

MACHINE = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"

app = typer.Typer()
app.add_typer(certs.app, name="certs")
app.command()(ticket)


def run(*arguments: object) -> Result:
    """What a command prints; an error of the catalogue comes through, anything else fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, VmferryError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """An authority in ``ca``, hosts ``a`` and ``b``, and a controller in ``nova``."""
    run("certs", "init", "--dir", tmp_path / "ca", "--trust-domain", "example.org")
    run("certs", "issue", "--ca", tmp_path / "ca", "--host", "a", "--out", tmp_path / "a")
    run("certs", "issue", "--ca", tmp_path / "ca", "--host", "b", "--out", tmp_path / "b", "--days", 2)
    run("certs", "issue", "--ca", tmp_path / "ca", "--controller", "scheduler", "--out", tmp_path / "nova")
    return tmp_path


def ticket_arguments(folders: Path) -> list[object]:
    return [
        "ticket", "--signer", folders / "nova", "--machine-id", MACHINE,
        "--source", HOST_A.uri, "--destination", HOST_B.uri, "--memory-mib", 64,
    ]  # fmt: skip


def test_folders_can_be_used(folders: Path) -> None:
    """What was typed is what the certificates say."""
    assert TlsFiles(folders / "a").load().identity == HOST_A
    assert TlsFiles(folders / "nova").load().identity == CONTROLLER
    assert (TlsFiles(folders / "b").load().not_after - datetime.now(UTC)).days == 1


def test_making_things_prints_no_data(tmp_path: Path) -> None:
    """Nothing but data goes to stdout, and these commands have none."""
    result = run("certs", "init", "--dir", tmp_path / "ca", "--trust-domain", "example.org")
    assert result.stdout == ""
    assert "ca.key" in result.stderr
    result = run("certs", "issue", "--ca", tmp_path / "ca", "--admin", "jane", "--out", tmp_path / "jane")
    assert result.stdout == ""
    assert "spiffe://example.org/admin/jane" in result.stderr


def test_show(folders: Path) -> None:
    """A person and a program learn who the folder is, until when, and whom it trusts."""
    facts = json.loads(run("certs", "show", folders / "b", "--json").stdout)
    material = TlsFiles(folders / "b").load()
    assert facts["identity"] == HOST_B.uri
    assert facts["server_name"] == HOST_B.server_name
    assert facts["key_sha256"] == material.key_sha256.hex()
    assert datetime.fromisoformat(facts["not_after"]) == material.not_after
    assert facts["days_left"] == 1
    assert len(facts["authorities"]) == 1
    assert "signs_tickets_as" not in facts
    text = run("certs", "show", folders / "nova").stdout
    assert text.count(CONTROLLER.uri) == 2
    assert "PRIVATE" not in text


def test_show_fails_as_a_service_would(folders: Path) -> None:
    """A folder that no service would start with is an error naming the file, not a description."""
    (folders / "a" / "tls.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"tls\.key can be opened by others"):
        run("certs", "show", folders / "a")
    (folders / "nova" / "ticket.key").unlink()
    with pytest.raises(ConfigError, match=r"ticket\.key"):
        run("certs", "show", folders / "nova")


@pytest.mark.parametrize("names", [[], ["--host", "c", "--admin", "c"], ["--host", "c", "--controller", "c"]])
def test_exactly_one_identity(folders: Path, names: list[str]) -> None:
    """Without a name, or with two, nothing is issued."""
    with pytest.raises(InvalidArgumentError, match="exactly one"):
        run("certs", "issue", "--ca", folders / "ca", "--out", folders / "c", *names)
    assert not (folders / "c").exists()


def test_a_name_is_a_label(folders: Path) -> None:
    """A name that could be taken for something else is refused."""
    with pytest.raises(InvalidArgumentError, match="DNS label") as caught:
        run("certs", "issue", "--ca", folders / "ca", "--out", folders / "c", "--host", "../c")
    assert caught.value.field == "name"


def test_renewing(folders: Path) -> None:
    """Only --force replaces a folder's certificate, and then by a new one of the same identity."""
    before = TlsFiles(folders / "a").load()
    arguments = ["certs", "issue", "--ca", folders / "ca", "--host", "a", "--out", folders / "a"]
    with pytest.raises(InvalidArgumentError, match="already holds"):
        run(*arguments)
    assert TlsFiles(folders / "a").load() == before
    run(*arguments, "--force")
    after = TlsFiles(folders / "a").load()
    assert after.identity == before.identity
    assert after.key_sha256 != before.key_sha256


def test_a_ticket_on_stdout(folders: Path) -> None:
    """The whole of stdout is a good ticket in base64, on one line."""
    result = run(*ticket_arguments(folders), "--vcpus", 4, "--valid-s", 60)
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    found = open_ticket(
        base64.b64decode(result.stdout, validate=False),
        ca_pem=(folders / "a" / "ca.pem").read_bytes(),
        now=datetime.now(UTC),
    )
    assert (found.signer, found.source, found.destination) == (CONTROLLER, HOST_A, HOST_B)
    assert (found.machine_id, found.max_memory_bytes, found.max_vcpus) == (MACHINE, 64 * 1024 * 1024, 4)
    assert (found.start_by - found.not_before).total_seconds() == 60


def test_a_ticket_as_a_document(folders: Path) -> None:
    """--json prints one document that repeats what the ticket in it says."""
    facts = json.loads(run(*ticket_arguments(folders), "--json").stdout)
    found = open_ticket(
        base64.b64decode(facts["ticket"], validate=True),
        ca_pem=(folders / "a" / "ca.pem").read_bytes(),
        now=datetime.now(UTC),
    )
    assert facts["migration_id"] == found.migration_id.hex()
    assert datetime.fromisoformat(facts["start_by"]) == found.start_by
    assert (facts["source"], facts["destination"]) == (HOST_A.uri, HOST_B.uri)


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--source", "a", "source"),
        ("--destination", HOST_A.uri, "destination"),
        ("--destination", CONTROLLER.uri, "destination"),
        ("--machine-id", "vm1", "machine_id"),
        ("--memory-mib", 0, "max_memory_bytes"),
        ("--memory-mib", 2**60, "max_memory_bytes"),
        ("--valid-s", 601, "valid_s"),
    ],
)
def test_bad_tickets_are_not_printed(folders: Path, option: str, value: object, field: str) -> None:
    """A ticket that no host would take is an error naming the option, and stdout stays empty."""
    with pytest.raises(InvalidArgumentError) as caught:
        run(*ticket_arguments(folders), option, value)
    assert caught.value.field == field


def test_a_host_signs_no_tickets(folders: Path) -> None:
    """A host's folder has nothing to sign with."""
    with pytest.raises(ConfigError, match=r"ticket\.crt"):
        run(*ticket_arguments(folders), "--signer", folders / "a")
