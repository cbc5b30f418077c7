"""``vmferry playground``: two hosts and running machines on this computer, to try things on.

Promise: ports and paths are always the same, so that the examples of the documentation work as pasted; Ctrl-C ends
everything that was started, and the folder is left for a look at logs, traces and journals.
"""

from __future__ import annotations

import asyncio
import json as json_module
import signal
from pathlib import Path
from typing import Annotated, Final

import typer

from vmferry.cli.demo_hosts import Ports, require_memory, two_hosts
from vmferry.cli.machine import run_machine
from vmferry.config import HostConfig
from vmferry.machines.spec import new_spec

PORTS: Final = {
    "a": Ports(source=7601, dest=7602, source_http=7603, dest_http=7604),
    "b": Ports(source=7611, dest=7612, source_http=7613, dest_http=7614),
}
MACHINE: Final = "canary"
_MOST: Final = 100
_MIB: Final = 1024 * 1024


def playground(
    folder: Annotated[
        Path,
        typer.Option(
            "--dir", metavar="DIR", help="Certificates, configurations, logs, traces; must be empty."
        ),
    ] = Path("playground"),
    memory_mib: Annotated[int, typer.Option("--memory-mib", min=4, help="Memory of each machine.")] = 256,
    machines: Annotated[
        int, typer.Option("--machines", min=1, max=_MOST, help="How many machines, all on host a.")
    ] = 1,
) -> None:
    """Run two hosts and machines on this computer until Ctrl-C."""
    asyncio.run(_run(folder, memory_mib, machines))


async def _run(folder: Path, memory_mib: int, count: int) -> None:
    names = [MACHINE, *(f"{MACHINE}-{number}" for number in range(2, count + 1))]
    # As many as may be on their way at a time are on both hosts for a moment.
    require_memory(memory_mib * _MIB * count, memory_mib * _MIB * min(count, HostConfig().max_outgoing))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    async with two_hosts(folder, ports=PORTS, option="--dir") as world:
        for name in names:
            await run_machine(new_spec(name, memory_mib, "canary"), world.a.host.config)
        hosts = {
            shore.host.name: {
                "host": shore.host.identity.uri,
                "source": shore.source.address,
                "destination": shore.dest.address,
                "pages": [
                    f"http://localhost:{port}/"
                    for port in (PORTS[shore.host.name].source_http, PORTS[shore.host.name].dest_http)
                ],
                "config": str(shore.host.config_file),
            }
            for shore in (world.a, world.b)
        }
        document = {
            "machine": MACHINE,
            "machines": names,
            "on": "a",
            "tls": str(world.admin_tls),
            "hosts": hosts,
        }
        print(json_module.dumps(document, indent=2), flush=True)
        typer.echo("ready; Ctrl-C ends everything", err=True)
        await stop.wait()
