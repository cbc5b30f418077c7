"""Run one micro-VM: ``python -m vmferry.machines.microvm --help``.

The process lives until ``quit`` or SIGTERM, whatever becomes of the process that started it. It logs to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import uuid
from pathlib import Path

from vmferry.errors import ConfigError, ExitCode
from vmferry.machines.microvm.guests import PROGRAMS
from vmferry.machines.microvm.machine import Machine, MachineOptions
from vmferry.machines.microvm.nic import parse_mac
from vmferry.machines.microvm.qmp_server import QmpServer

_log = logging.getLogger("vmferry.machines.microvm")


def main() -> int:
    """Run the machine that the command line describes."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(_run(_options(arguments), arguments.qmp, start=not arguments.paused))
    except ConfigError as error:
        sys.stderr.write(f"error: {error} (--{error.field})\n")
        return ExitCode.USAGE
    return ExitCode.OK


async def _run(options: MachineOptions, qmp: Path, *, start: bool) -> None:
    machine = Machine(options)
    try:
        await machine.listen()
        server = QmpServer(machine, qmp)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.quit)
        if start and not options.incoming:
            machine.cont()
        await server.serve()
    finally:
        machine.close()
    _log.info("ended")


def _options(arguments: argparse.Namespace) -> MachineOptions:
    program = PROGRAMS[arguments.program]
    return MachineOptions(
        name=arguments.name,
        uuid=str(arguments.uuid),
        memory_bytes=arguments.memory_mib << 20,
        ram_file=arguments.ram_file,
        serial_file=arguments.serial_file,
        mac=parse_mac(arguments.mac),
        netdev=arguments.netdev,
        program=program,
        parameters=program.slots(_parameters(arguments.param)),
        incoming=arguments.incoming is not None,
        self_track=arguments.self_track == "on",
        metadata=arguments.metadata,
    )


def _parameters(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or key in found:
            raise ConfigError(f"{text!r} is not a KEY=VALUE that was not given before", field="param")
        found[key] = value
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vmferry.machines.microvm", description="Run one micro-VM."
    )
    parser.add_argument("--name", required=True)
    parser.add_argument("--uuid", required=True, type=uuid.UUID)
    parser.add_argument("--memory-mib", required=True, type=_memory_mib)
    parser.add_argument("--ram-file", required=True, type=Path, help="an existing file of exactly that size")
    parser.add_argument("--qmp", required=True, type=Path, help="where to listen for QMP (a unix socket)")
    parser.add_argument("--serial-file", required=True, type=Path, help="serial output is appended to it")
    parser.add_argument("--mac", required=True, help="e.g. 52:54:00:aa:bb:cc")
    parser.add_argument("--netdev", help="dgram:unix:PATH or dgram:HOST:PORT")
    parser.add_argument(
        "--metadata", type=Path, help="where the host's metadata service connects (a unix socket)"
    )
    parser.add_argument("--program", required=True, choices=sorted(PROGRAMS))
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE", help="see guests/*.S")
    parser.add_argument("-S", dest="paused", action="store_true", help="do not run the guest before `cont`")
    parser.add_argument("--incoming", choices=["defer"], help="wait for device state (`migrate-incoming`)")
    parser.add_argument(
        "--self-track", choices=["on", "off"], default="on", help="let the kernel note writes to RAM"
    )
    return parser


def _memory_mib(text: str) -> int:
    mib = int(text)
    if not 2 <= mib <= 1 << 20:  # noqa: PLR2004 - the first MiB is the program's
        raise argparse.ArgumentTypeError("from 2 MiB to 1 TiB")
    return mib


if __name__ == "__main__":
    sys.exit(main())
