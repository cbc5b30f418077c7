"""What the hypervisor of a guest says itself, whatever the services know."""

from __future__ import annotations

from tests.integration.hosts import Guest
from tests.integration.services import Host
from vmferry.machines.port import RunState


async def run_state(host: Host, guest: Guest) -> RunState:
    """What the hypervisor itself says."""
    machine = host.directory.open(host.record(guest.id))
    try:
        return await machine.run_state()
    finally:
        await machine.close()
