"""``vmferry machine`` with real machines: born, shown, stopped, as the host's journal has it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import wait_until
from vmferry.cli import main
from vmferry.config import load_config
from vmferry.errors import ExitCode
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.rights import Standing
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.microvm import verdict
from vmferry.machines.process import ProcessIdentity

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def host() -> Iterator[Path]:
    """The configuration of a host; its machines are ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="vmferry-") as folder:
        config = Path(folder) / "host.toml"
        config.write_text('state_dir = "state"\nrun_dir = "run"\nram_dir = "ram"\n')
        yield config
        for machine in json.loads(_quietly("machine", "list", "--json", "--config", str(config)))["machines"]:
            _quietly("machine", "stop", machine["name"], "--config", str(config))


@pytest.fixture
def machine(host: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs ``vmferry machine``."""

    def command(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main.run(["machine", *arguments, "--config", str(host)])
        return code, *capfd.readouterr()

    return command


def test_a_machine_lives_from_run_to_stop(host: Path, machine: Command) -> None:
    """It runs after its birth was recorded, is shown, and leaves nothing when it was stopped."""
    config = load_config(host)
    code, out, _ = machine(
        "run", "--name", "web-1", "--memory-mib", "16", "--param", "resident-mib=2", "--json"
    )
    assert code == ExitCode.OK
    born = json.loads(out)
    assert (born["state"], born["right"]) == ("MACHINE_STATE_RUNNING", "MACHINE_RIGHT_OWNED")
    serial = config.machines_dir / "web-1" / "serial.log"
    wait_until(lambda: verdict.verdict(serial.read_text()).ok, what="the guest's first sign of life")

    (shown,) = json.loads(machine("list", "--json")[1])["machines"]
    assert shown == born
    assert machine("run", "--name", "web-1", "--memory-mib", "16")[0] == ExitCode.PRECONDITION

    process = ProcessIdentity.of(born["pid"])
    assert machine("stop", born["uuid"])[0] == ExitCode.OK
    assert process is not None
    assert not process.alive()
    assert HostLedger(config.journal_dir).rights(born["uuid"]).standing is Standing.GONE
    assert not list(config.machines_dir.iterdir())
    assert not list(config.ram_dir.iterdir())


def test_a_machine_that_cannot_start_was_never_born(host: Path, machine: Command) -> None:
    """When the guest's memory file is in the way, no journal speaks of the machine and no folder is left."""
    config = load_config(host)
    spec = host.with_name("spec.toml")
    uuid = "6d0c3f5e-7a38-4a51-9a57-0f3e6a1c9b11"
    spec.write_text(
        f'name = "web-1"\nuuid = "{uuid}"\nmemory_mib = 16\n'
        '[microvm]\nprogram = "canary"\nmac = "52:54:00:00:00:01"\n'
    )
    config.ram_dir.mkdir(mode=0o700)
    (config.ram_dir / f"{uuid}.ram").touch()

    code, _, err = machine("run", str(spec))

    assert code == ExitCode.PRECONDITION
    assert "MACHINE_EXISTS" in err
    assert HostLedger(config.journal_dir).rights(uuid).standing is Standing.NEVER_SEEN
    assert not MachineDirectory(config.machines_dir, config.ram_dir).list()


def test_a_machine_whose_process_died_can_be_stopped(host: Path, machine: Command) -> None:
    """It is shown as dead, and stop removes what is left of it."""
    config = load_config(host)
    machine("run", "--name", "web-1", "--memory-mib", "16", "--param", "resident-mib=2")
    (record,) = MachineDirectory(config.machines_dir, config.ram_dir).list()
    assert record.process is not None
    record.process.send_signal(9)
    wait_until(lambda: not record.process.alive(), what="the end of the process")

    (shown,) = json.loads(machine("list", "--json")[1])["machines"]
    assert (shown["state"], shown["pid"]) == ("MACHINE_STATE_DEAD", 0)
    assert machine("stop", "web-1")[0] == ExitCode.OK
    assert not list(config.ram_dir.iterdir())


def _quietly(*arguments: str) -> str:
    with tempfile.TemporaryFile("w+") as out, contextlib.redirect_stdout(out):
        main.run(arguments)
        out.seek(0)
        return out.read()
