"""``vmferry warrant``: what it prints is what a host accepts."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_source import HOST_A, HOST_B, MACHINE_ID
from vmferry.errors import ExitCode
from vmferry.security.warrants import open_warrant


def test_it_is_a_warrant_for_just_that(run: Run, certificates: Path) -> None:
    """In base64, with source, destinations, machines and their largest size; --json says the same beside it."""
    operator = certificates / "operator"
    wanted = ("warrant", "--signer", operator, "--source", HOST_A, "--destination", HOST_B)

    ran = run(*wanted, "--machine-id", MACHINE_ID, "--memory-mib", 64, "--vcpus", 2, "--json")

    assert ran.code == ExitCode.OK, ran.err
    document = json.loads(ran.out)
    found = open_warrant(
        base64.b64decode(document["warrant"]),
        ca_pem=(operator / "ca.pem").read_bytes(),
        now=datetime.now(UTC),
    )
    assert found.source.uri == document["source"] == HOST_A
    assert found.destinations == {HOST_B}
    assert list(found.machines) == document["machine_ids"] == [MACHINE_ID]
    assert found.machines[MACHINE_ID].max_memory_bytes == 64 << 20
    assert found.machines[MACHINE_ID].max_vcpus == 2


def test_what_no_host_would_accept_is_not_signed(run: Run, certificates: Path) -> None:
    """A host cannot be emptied into itself."""
    ran = run(
        *("warrant", "--signer", certificates / "operator", "--source", HOST_A, "--destination", HOST_A),
        *("--machine-id", MACHINE_ID, "--memory-mib", 64),
    )

    assert ran.code == ExitCode.USAGE
    assert "destinations" in ran.err
