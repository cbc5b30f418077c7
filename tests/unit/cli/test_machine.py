"""``vmferry machine``: what it refuses, before anything is started. What it starts is in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.conftest import Run
from vmferry.cli.machine import print_machines
from vmferry.errors import ExitCode
from vmferry.v1 import machine_pb2

SPEC = """
name = "web-1"
uuid = "6d0c3f5e-7a38-4a51-9a57-0f3e6a1c9b11"
memory_mib = 16

[microvm]
program = "canary"
mac = "52:54:00:00:00:01"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a host with nothing on it."""
    file = tmp_path / "host.toml"
    file.write_text('state_dir = "state"\nrun_dir = "run"\nram_dir = "ram"\n')
    return file


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ((), "--name"),
        (("/nowhere.toml",), "/nowhere.toml"),
        (("--name", "Web_1"), "name"),
        (("--name", "web-1", "--memory-mib", "0"), "--memory-mib"),
        (("--name", "web-1", "--memory-mib", "-8"), "--memory-mib"),
        (("--name", "web-1", "--program", "doom"), "program"),
        (("--name", "web-1", "--param", "tick-us"), "--param"),
        (("--name", "web-1", "--param", "speed=1"), "speed"),
        (("--name", "web-1", "--param", "tick-us=soon"), "tick-us"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(
    run: Run, config: Path, arguments: tuple[str, ...], culprit: str
) -> None:
    """What is wrong with the options is named, and nothing is made."""
    ran = run("machine", "run", *arguments, "--config", config)

    assert ran.code == ExitCode.USAGE, ran.err
    assert culprit in ran.err
    assert not ran.out
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("name = ", "TOML"),
        (SPEC + "cpus = 2\n", "cpus"),
        (SPEC.replace("16", '"16"'), "memory_mib"),
        (SPEC.replace("memory_mib = 16\n", ""), "memory_mib"),
        (SPEC.replace("6d0c3f5e", "6D0C3F5E"), "uuid"),
        (SPEC.replace("canary", "doom"), "doom"),
        (SPEC + '[microvm.params]\nspeed = "1"\n', "speed"),
    ],
)
def test_a_wrong_description_is_refused(run: Run, config: Path, text: str, culprit: str) -> None:
    """What is wrong with the file is named, and nothing is made."""
    spec = config.with_name("spec.toml")
    spec.write_text(text)

    ran = run("machine", "run", spec, "--config", config)

    assert ran.code == ExitCode.USAGE, ran.err
    assert culprit in ran.err
    assert not (config.parent / "run").exists()


def test_a_description_and_a_name_contradict(run: Run, config: Path) -> None:
    """A file with the whole description leaves nothing for --name to say."""
    spec = config.with_name("spec.toml")
    spec.write_text(SPEC)

    assert run("machine", "run", spec, "--name", "web-2", "--config", config).code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("text", "culprit"), [("lanes = 1", "lanes"), ("speed = 9", "speed"), ("lanes", "TOML")]
)
def test_a_wrong_configuration_is_refused(run: Run, config: Path, text: str, culprit: str) -> None:
    """What is wrong with the host's configuration is named."""
    config.write_text(text)

    for command in (("list",), ("stop", "web-1"), ("run", "--name", "web-1")):
        ran = run("machine", *command, "--config", config)
        assert ran.code == ExitCode.USAGE
        assert culprit in ran.err


def test_nothing_is_there(run: Run, config: Path) -> None:
    """An empty host lists nothing, and has no machine to stop."""
    assert run("machine", "list", "--json", "--config", config).out == '{\n  "machines": []\n}\n'

    ran = run("machine", "stop", "web-1", "--config", config)

    assert ran.code == ExitCode.PRECONDITION
    assert "MACHINE_NOT_FOUND" in ran.err


def test_the_list_tells_what_memory_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Any other kind than the usual one is named beside its size."""
    machines = [machine_pb2.Machine(name=name) for name in ("usual", "other", "small")]
    for machine, backing in zip(machines, ("tmpfs", "hugetlbfs", ""), strict=True):
        machine.spec.memory_mib = 64
        if backing:
            machine.spec.qemu.memory_backing = backing
    print_machines(machines)
    lines = capsys.readouterr().out.splitlines()
    assert ["hugetlbfs" in line for line in lines[1:]] == [False, True, False]
    assert all("64 MiB" in line for line in lines[1:])
    assert "tmpfs" not in "".join(lines)
