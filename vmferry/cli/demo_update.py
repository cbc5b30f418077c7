"""``vmferry demo --update``: another hypervisor process beneath a running guest, and what the guest says about it.

Promise: nothing is pretended, as in the other demonstration; ``guest_ok`` is true only if the guest, asked after the
last update, has found all that it has as it left it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.cli.connection import open_source
from vmferry.cli.demo_guest import Guest
from vmferry.cli.demo_hosts import TwoHosts, show_logs, two_hosts
from vmferry.cli.machine import run_machine
from vmferry.cli.update import document, exit_code, sentence
from vmferry.client.updating import Wanted
from vmferry.config import HostConfig
from vmferry.errors import ExitCode
from vmferry.telemetry.tracing import configure, phase
from vmferry.v1 import update_pb2 as pb


@dataclass
class Updated:
    """What was found out."""

    updates: list[pb.Update] = field(default_factory=list)
    guest_ok: bool = False

    @property
    def exit_code(self) -> ExitCode:
        """How the command ends."""
        last = exit_code(self.updates[-1])
        return last if last is not ExitCode.OK or self.guest_ok else ExitCode.INTEGRITY

    def document(self) -> dict[str, Any]:
        """The document: of the last update, with the (higher) median of all pauses."""
        every = [document(one) for one in self.updates]
        last = every[-1]
        names = ("machine", "outcome", "reason", "message", "memory_bytes", "bytes_copied", "trace_id")
        clock = [name for name in last if name.startswith("clock_")]
        return {
            **{name: last[name] for name in (*names, *clock)},
            "pause_ms": statistics.median_high(one["pause_ms"] for one in every),
            "guest_ok": self.guest_ok,
            "old_version": every[0]["old_version"],
            "new_version": last["new_version"],
            "updates": every,
        }


async def demonstrate(
    keep: Path | None,
    make: Callable[[TwoHosts], Guest],
    binary: str,
    repeat: int,
    tell: Callable[[str], None],
) -> Updated:
    """Start a guest, and update it in place.

    Args:
        keep: folder for what stays.
        make: describes the guest.
        binary: another QEMU that is to run it; empty: the same one.
        repeat: how often.
        tell: shows a line.
    """
    allowed = (*HostConfig.qemu_binaries, *((Path(binary),) if binary else ()))
    async with two_hosts(keep, settings={"qemu_binaries": allowed}) as world:
        tell("vmferry demo: a guest runs on while the process beneath it is replaced.\n")
        write_out = configure("scheduler", world.trace_dir, host="operator")
        try:
            found = await _updated(world, make(world), binary, repeat, tell)
        finally:
            write_out()
        if found.exit_code is not ExitCode.OK:
            show_logs(world)
        return found


async def _updated(
    world: TwoHosts, guest: Guest, binary: str, repeat: int, tell: Callable[[str], None]
) -> Updated:
    host, found = world.a.host, Updated()
    await run_machine(guest.spec, host.config)
    await guest.wait_ready(host)
    tell(f"  started   {guest.spec.name}: {guest.spec.memory_mib} MiB")
    async with open_source(world.a.source.address, host.identity.uri, world.admin_tls) as source:
        for _ in range(repeat):
            wanted = Wanted(guest.spec.uuid, pb.UpdateTarget(qemu_binary=binary))
            with phase("schedule"):
                found.updates.append(await source.update_in_place(wanted))
            tell(f"  update    {sentence(found.updates[-1])}")
            if exit_code(found.updates[-1]) is not ExitCode.OK:
                return found
            await guest.next_work(host)
    whole, words = await guest.check_everything(host)
    tell(f"  the guest {words}")
    found.guest_ok = whole and await guest.well(host)
    return found
