"""QEMU's guest agent for the Linux guest of demonstrations and tests: this computer's own, with its libraries.

Promise: what is put into the guest is the agent that the distribution ships, unchanged; where there is none, that is
said. ``init.sh`` starts it if it is there.
"""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path
from typing import Final

from vmferry.errors import InvalidArgumentError
from vmferry.machines.qemu.guest import Entry, modules_of

AGENT: Final = Path("/usr/sbin/qemu-ga")
AGENT_MODULES: Final = ("virtio_pci", "virtio_console")
"""What a guest needs for its end of the channel, unless it is built into its kernel."""

_LDD_S: Final = 10.0
_LIBRARY: Final = re.compile(r"(/\S+) \(0x")


def agent_entries(agent: Path = AGENT) -> list[Entry]:
    """The agent and its libraries, for an archive of their own behind the guest's file system.

    Raises:
        InvalidArgumentError: there is no agent on this computer, or its libraries cannot be found.
    """
    try:
        told = subprocess.run(  # noqa: S603 - a program of the system's, asked about one that it brings
            ["/usr/bin/ldd", str(agent)], capture_output=True, text=True, timeout=_LDD_S, check=True
        ).stdout
        libraries = [Path(name) for name in _LIBRARY.findall(told)]
        files = {"bin/qemu-ga": agent} | {str(path).lstrip("/"): path for path in libraries}
        found = {name: path.read_bytes() for name, path in files.items()}
    except (OSError, subprocess.SubprocessError) as error:
        raise InvalidArgumentError(
            f"there is no guest agent for a guest here: {error}",
            field="agent",
            remedy="Install it (on Debian: apt install qemu-guest-agent).",
        ) from error
    folders = {str(parent) for name in found for parent in Path(name).parents} - {".", "bin"}
    return [
        *(Entry(folder, stat.S_IFDIR | 0o755) for folder in sorted(folders)),
        *(Entry(name, stat.S_IFREG | 0o755, data) for name, data in found.items()),
    ]


def agent_modules(kernel: Path) -> list[Path]:
    """The modules by which a kernel finds the channel.

    Raises:
        InvalidArgumentError: its modules are not installed.
    """
    try:
        return modules_of(kernel, AGENT_MODULES)
    except OSError as error:
        raise InvalidArgumentError(
            f"the modules of {kernel} cannot be read: {error.strerror}", field="--kernel"
        ) from error
