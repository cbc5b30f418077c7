"""``vmferry machine``: starts, shows, types at and stops the machines of the host it runs on.

Promise: a machine's guest runs only after its birth is recorded in the host's journal; one that is on its way to or
from another host is never stopped.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vmferry.cli.console import attach
from vmferry.cli.output import JsonOption, as_document, label, print_document, print_table, say
from vmferry.config import HostConfig, load_config
from vmferry.errors import InvalidArgumentError, MachineDeadError
from vmferry.handoff.ledger import HostLedger
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.launcher import start_anew, start_machine, stop_machine
from vmferry.machines.microvm.guests import PROGRAMS
from vmferry.machines.qemu.probe import resolve
from vmferry.machines.qemu.spec import SERIAL_SOCKET
from vmferry.machines.spec import MachineSpec, new_spec
from vmferry.memory.backings import TMPFS
from vmferry.recovery.examination import Examiner
from vmferry.v1 import machine_pb2

app = typer.Typer(help="Start, show and stop the machines of this host.", no_args_is_help=True)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", envvar="VMFERRY_CONFIG", help="Configuration of this host; default: built-in."),
]


def directory_of(config: HostConfig) -> MachineDirectory:
    """Where the machines of a host lie."""
    return MachineDirectory(
        config.machines_dir, config.ram_dir, config.huge_root, qmp_timeout_s=config.qmp_timeout_s
    )


async def run_machine(spec: MachineSpec, config: HostConfig) -> MachineRecord:
    """Start a machine that is born on this host, or that is this host's and has lost its process; its guest runs.

    Raises:
        InvalidArgumentError: there is no such guest program, or it has no such parameter; or this host's QEMU
            lacks what the machine asks for.
        MachineExistsError: its name or identity is taken here.
        MachineFailedError: the hypervisor does not start.
    """
    _check_program(spec)
    spec = await asyncio.to_thread(resolve, spec)
    directory = directory_of(config)
    ledger = HostLedger(config.journal_dir)
    if ledger.rights(spec.uuid).permitted:
        return await _start_anew(spec, directory, ledger)
    machine = await start_machine(spec, directory)
    try:
        permit = ledger.birth(spec.uuid)
        try:
            await machine.cont(permit)
        except BaseException:
            ledger.end(spec.uuid)
            raise
    except BaseException:
        await stop_machine(machine, directory)
        raise
    await machine.close()
    return directory.find(spec.uuid)


async def _start_anew(spec: MachineSpec, directory: MachineDirectory, ledger: HostLedger) -> MachineRecord:
    machine = await start_anew(spec, directory, lambda: ledger.permitted(spec.uuid))
    await machine.close()
    return directory.find(spec.uuid)


async def end_machine(name: str, config: HostConfig) -> MachineRecord:
    """End a machine for good and remove all that is left of it; its last record is returned.

    Raises:
        MachineNotFoundError: it is not here.
        MachineBusyError: it is on its way to another host.
    """
    directory = directory_of(config)
    record = directory.find(name)
    # Recorded before it is done: should this be interrupted, nobody may run what is half removed.
    HostLedger(config.journal_dir).end(record.spec.uuid)
    if record.alive:
        await stop_machine(directory.open(record), directory)
    else:
        directory.forget(record, remove_ram=True)
    return record


async def describe(records: list[MachineRecord], config: HostConfig) -> list[machine_pb2.Machine]:
    """What the host knows of machines, in the words of the API; with blocked ones of which only journals are left."""
    directory = directory_of(config)
    examiner = Examiner(directory, config.journal_dir, HostLedger(config.journal_dir))
    found = [await examiner.machine(record) for record in records]
    return [*found, *await examiner.strays(directory.list())]


def print_machines(machines: Sequence[machine_pb2.Machine], *, hosts: Sequence[str] = ()) -> None:
    """Print machines as a table; with the host of each, if hosts are given."""
    blocked = any(machine.HasField("blockage") for machine in machines)
    rows = [
        (
            machine.name or "-",
            label(machine_pb2.MachineState, machine.state, "MACHINE_STATE_"),
            label(machine_pb2.MachineRight, machine.right, "MACHINE_RIGHT_"),
            _memory(machine.spec),
            _label(machine.spec),
            *([machine.blockage.reason or "-"] if blocked else []),
            *hosts[number : number + 1],
            machine.uuid,
        )
        for number, machine in enumerate(machines)
    ]
    # Most of the time there is none, and a terminal has better use for the room.
    more = [*(["BLOCKED"] if blocked else []), *(["HOST"] if hosts else [])]
    headings = ("NAME", "STATE", "RIGHT", "MEMORY", "KIND", *more, "UUID")
    print_table(headings, rows, empty="no machines")
    for machine in machines:
        if machine.HasField("blockage"):
            name = machine.name or machine.uuid
            say(f"{name} is blocked{since(machine.blockage)}: {machine.blockage.message}")
            say(f"  remedy: {machine.blockage.remedy}")


def since(blockage: machine_pb2.Blockage) -> str:
    """Since when a machine is blocked, if that is known."""
    if not blockage.HasField("since"):
        return ""
    return f" since {blockage.since.ToDatetime():%Y-%m-%d %H:%M:%SZ} by that host's clock"


@app.command()
def run(
    spec_file: Annotated[
        Path | None, typer.Argument(metavar="[SPEC.toml]", help="The whole description.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name: a lower-case DNS label.")] = "",
    program: Annotated[str, typer.Option("--program", help="Guest program: canary or writer.")] = "canary",
    memory_mib: Annotated[int, typer.Option("--memory-mib", min=1, help="Guest memory.")] = 256,
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="KEY=VALUE", help="Parameter of the program.")
    ] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Start a machine on this host, from a description or from options."""
    host = load_config(config)
    if (spec_file is None) == (not name):
        raise InvalidArgumentError(
            "give either a file with the machine's description or --name, not both", field="--name"
        )
    spec = (
        MachineSpec.load(spec_file)
        if spec_file
        else new_spec(name, memory_mib, program, _params(param or []))
    )
    machine = asyncio.run(_run(spec, host))
    if json:
        print_document(as_document(machine))
    else:
        print(f"{machine.name} {machine.uuid}")
        say(f"{machine.name} runs as process {machine.pid}")


@app.command()
def start(
    name: Annotated[str, typer.Argument(metavar="MACHINE", help="Name or UUID.")],
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Start a machine anew that belongs to this host and whose process is gone; its guest boots."""
    host = load_config(config)
    directory = directory_of(host)
    spec = directory.find(name).spec
    record = asyncio.run(_start_anew(spec, directory, HostLedger(host.journal_dir)))
    machine, *_ = asyncio.run(describe([record], host))
    if json:
        print_document(as_document(machine))
    else:
        say(f"{machine.name} runs anew as process {machine.pid}")


@app.command("list")
def list_(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Show the machines of this host."""
    host = load_config(config)
    directory = directory_of(host)
    records = directory.list()
    machines = asyncio.run(describe(records, host))
    if json:
        print_document({"machines": [as_document(machine) for machine in machines]})
    else:
        print_machines(machines)
    for problem in directory.problems:
        say(f"vmferry: warning: {problem.path}: {problem.reason}")


@app.command()
def stop(
    name: Annotated[str, typer.Argument(metavar="MACHINE", help="Name or UUID.")],
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """End a machine of this host for good; its memory is lost."""
    record = asyncio.run(end_machine(name, load_config(config)))
    if json:
        print_document({"name": record.spec.name, "uuid": record.spec.uuid, "stopped": True})
    else:
        say(f"{record.spec.name} is stopped and removed")


@app.command()
def console(
    name: Annotated[str, typer.Argument(metavar="MACHINE", help="Name or UUID.")],
    config: ConfigOption = None,
) -> None:
    """Connect this terminal to a machine's serial port; Ctrl-] leaves."""
    record = directory_of(load_config(config)).find(name)
    part = record.spec.qemu
    if part is None or part.serial != SERIAL_SOCKET:
        raise InvalidArgumentError(
            f"the serial port of {record.spec.name} leads to a file alone: {record.paths.serial}",
            field="qemu.serial",
            remedy='Describe the machine with serial = "socket"; what it wrote is in that file.',
        )
    if not record.alive:
        raise MachineDeadError(f"machine {record.spec.name} has no running process", machine=record.spec.uuid)
    say(f"connected to {record.spec.name}; Ctrl-] leaves")
    attach(record.paths.serial_socket, sys.stdin.fileno(), sys.stdout.fileno())
    say(f"left {record.spec.name}")


async def _run(spec: MachineSpec, config: HostConfig) -> machine_pb2.Machine:
    return (await describe([await run_machine(spec, config)], config))[0]


def _check_program(spec: MachineSpec) -> None:
    """Refuse what the guest would refuse, before anything is started."""
    if spec.microvm is None:
        return
    program = PROGRAMS.get(spec.microvm.program)
    if program is None:
        raise InvalidArgumentError(
            f"there is no guest program {spec.microvm.program!r}; there are {', '.join(PROGRAMS)}",
            field="microvm.program",
        )
    program.slots(spec.microvm.params)


def _memory(spec: machine_pb2.MachineSpec) -> str:
    """How much memory a machine has, and of which kind if it is not the usual one; nothing if that is not known."""
    if not spec.memory_mib:
        return "-"
    kind = spec.qemu.memory_backing if spec.HasField("qemu") else TMPFS
    return f"{spec.memory_mib} MiB" + ("" if kind == TMPFS else f" {kind}")


def _label(spec: machine_pb2.MachineSpec) -> str:
    """What a machine is, in a few words."""
    if not spec.kind:
        return "-"
    return f"{spec.kind} {spec.microvm.program if spec.HasField('microvm') else spec.qemu.machine}"


def _params(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidArgumentError(f"{text!r} is not of the form KEY=VALUE", field="--param")
        found[key] = value
    return found
