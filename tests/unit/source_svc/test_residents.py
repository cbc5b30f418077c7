"""Who is on a host while a machine goes from one process to another in the middle of a look."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from source_svc.residents import Residents
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.process import ProcessIdentity
from vmferry.machines.spec import new_spec


class _Host(MachineDirectory):
    """A host with one machine; something may happen just before, or just after, it is listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, root, qmp_timeout_s=1.0)
        root.mkdir()
        spec = new_spec("web", 4, "canary")
        self.id = spec.uuid
        self.record = MachineRecord(spec, self.paths(spec), None, alive=False)
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        self.processes: list[subprocess.Popen[bytes]] = []

    def begin_process(self) -> None:
        """Let the machine go on in another process, which is recorded."""
        self.processes.append(subprocess.Popen(["sleep", "600"]))
        self.record = replace(self.record, process=ProcessIdentity.of(self.processes[-1].pid))
        self.touch()

    def end_process(self) -> None:
        """End the machine's process."""
        self.processes[-1].kill()
        self.processes[-1].wait()

    def touch(self) -> None:
        """Change something in the folder, so that it is listed again."""
        (self.root / f"{len(list(self.root.iterdir()))}").touch()

    def list(self) -> list[MachineRecord]:
        """What is here."""
        self.before()
        process = self.record.process
        found = [replace(self.record, alive=process is not None and process.alive())]
        self.after()
        return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[_Host]:
    """A host, whose processes are gone afterwards."""
    made = _Host(tmp_path / "m")
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


def test_a_process_that_ends_during_the_look_does_not_take_its_machine_away(host: _Host) -> None:
    """It was alive when the look began, and is not listed, as an update has just ended it."""
    updated: set[str] = set()

    def update() -> None:
        updated.add(host.id)
        host.end_process()

    residents = Residents(host, between=updated.__contains__)
    host.begin_process()
    assert residents.look()
    host.before = update
    host.touch()
    assert residents.look()
    assert set(residents.records) == {host.id}


def test_an_update_that_ends_during_the_look_does_not_take_its_machine_away(host: _Host) -> None:
    """The old process was listed, which has ended; when that is noticed, the new one is recorded."""
    updated: set[str] = set()

    def update() -> None:
        host.after = lambda: None
        host.begin_process()

    residents = Residents(host, between=updated.__contains__)
    host.begin_process()
    assert residents.look()
    host.end_process()
    host.after = update
    assert residents.look()
    assert [record.process for record in residents.records.values()] == [host.record.process]


def test_a_machine_whose_process_ends_for_good_is_gone(host: _Host) -> None:
    """Nobody updates it."""
    residents = Residents(host, between=lambda _: False)
    host.begin_process()
    assert residents.look()
    assert not residents.look()
    host.end_process()
    assert residents.look()
    assert not residents.records
