"""Plans of tests: what would stand in the way of moving a machine between hosts, and machines to plan with."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import Guest, World, migration_options
from tests.integration.qemu.conftest import QEMU
from tests.integration.services import DEADLINE_S, Host
from vmferry.cli.machine import run_machine
from vmferry.machines.monitor import Monitor
from vmferry.machines.qemu import probe
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.spec import new_qemu_spec
from vmferry.v1 import compatibility_pb2
from vmferry.v1 import migration_pb2 as pb

Item = compatibility_pb2.CompatibilityItem
NOTE = compatibility_pb2.SEVERITY_NOTE
WARNS = compatibility_pb2.SEVERITY_WARNS
BLOCKS = compatibility_pb2.SEVERITY_BLOCKS

Told = list[tuple[str, str, str]]
"""Severity, name and object of findings."""


async def plan(
    world: World,
    guest: Guest,
    here: Host | None = None,
    there: Host | None = None,
    *,
    address: str = "",
    **options: Any,
) -> Sequence[Item]:
    """Everything that a plan says, checked for what holds of every plan."""
    here, there = here or world.a, there or world.b
    request = pb.PlanMigrationRequest(
        machine=guest.id,
        destination=pb.Destination(host=there.identity.uri, address=address or there.dest.address),
        options=migration_options(**options),
    )
    async with world.source(here) as stub:
        report = (await stub.PlanMigration(request, timeout=3 * DEADLINE_S)).report
    severities = [item.severity for item in report.items]
    assert severities == sorted(severities, reverse=True)
    assert report.compatible == (BLOCKS not in severities)
    for item in report.items:
        assert item.id, item
        assert item.message, item
        assert item.object, item
        assert item.remedy or item.severity == NOTE, item
    return report.items


def beyond_notes(items: Sequence[Item]) -> Told:
    """What a plan says, but for notes, in an order of its own."""
    words = {BLOCKS: "blocks", WARNS: "warns"}
    return sorted((words[item.severity], item.id, item.object) for item in items if item.severity != NOTE)


async def run_bare(world: World, host: Host | None = None, **changes: Any) -> Guest:
    """Run a machine whose firmware finds nothing to boot, which is enough to plan with."""
    host = host or world.a
    vcpus, name = changes.pop("vcpus", 1), changes.pop("name", f"bare-{uuid.uuid4().hex[:8]}")
    spec = new_qemu_spec("bare", 16, vcpus, QemuSpec(**{"machine": "pc", "accelerator": "tcg", **changes}))
    record = await run_machine(replace(spec, name=name), host.config)
    guest = Guest(record.spec, host)
    world.guests.append(guest)
    return guest


@contextlib.asynccontextmanager
async def by_hand(host: Host, guest: Guest) -> Any:
    """The machine's second monitor, as an operator would use it behind our back."""
    record = host.record(guest.id)
    assert record.process is not None
    paths = record.paths
    monitor = Monitor(record.spec, paths, record.process, paths.observer, qmp_timeout_s=DEADLINE_S)
    try:
        yield monitor
    finally:
        await monitor.close()


def script(path: Path, text: str) -> Path:
    """A program of a few lines."""
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def qemu_by_path(folder: Path) -> Path:
    """One path by which all hosts know QEMU, that runs the first QEMU in the PATH, which differs between them."""
    return script(folder / "qemu", f'exec {QEMU.name} "$@"')


def path_with(qemu: str, folder: Path) -> str:
    """A PATH in which the QEMU that a line of shell runs comes first."""
    script(folder / QEMU.name, qemu)
    return f"{folder}:{os.environ['PATH']}"


@contextlib.contextmanager
def as_on(path: str) -> Iterator[None]:
    """Start machines from here as a host with this PATH would."""
    # What a file can do is remembered, and here the file stays while what it runs changes.
    remembered = (probe._probe_binary, probe._accelerator_problem, probe._guest_cpuid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        for one in remembered:
            one.cache_clear()
        yield
    for one in remembered:
        one.cache_clear()
