"""What tracking or a crossing may not leave behind, in a machine's process or in a service."""

from __future__ import annotations

from pathlib import Path

from tests.integration.hosts import Guest
from tests.integration.services import Host, descriptors


def left_in_process(host: Host, guest: Guest) -> list[str]:
    """What write tracking left in a machine's process: descriptors, and memory whose writes the kernel notes."""
    pid = host.machine_pid(guest.id)
    smaps = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    noted = [line for line in smaps if line.startswith("VmFlags:") and "uw" in line.split()]
    return noted + [what for what in descriptors(pid) if "userfaultfd" in what]
