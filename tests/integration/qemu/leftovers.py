"""What a crossing leaves: nothing in a machine's process, and what the guest said, wherever it was."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from tests.integration.hosts import Guest
from tests.integration.services import Host, descriptors


def left_in_process(host: Host, guest: Guest) -> list[str]:
    """What write tracking left in a machine's process: descriptors, and memory whose writes the kernel notes."""
    pid = host.machine_pid(guest.id)
    smaps = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    noted = [line for line in smaps if line.startswith("VmFlags:") and "uw" in line.split()]
    return noted + [what for what in descriptors(pid) if "userfaultfd" in what]


class Chronicle:
    """All that a guest said on its way from host to host; what it said on one is removed there when it leaves."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._files: list[BinaryIO] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def follow(self, host: Host) -> None:
        """The guest has come to a host."""
        self._files.append(host.directory.paths(self._guest.spec).serial.open("rb"))

    def text(self) -> str:
        """What it said so far."""
        for file in self._files:
            file.seek(0)
        return b"".join(file.read() for file in self._files).decode("ascii", "replace")
