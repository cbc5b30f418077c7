"""Where the files of a machine lie, and how they are written.

Promise: every path is absolute and short enough for a unix socket, or refused before anything is made; a file
that others read appears whole or not at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import ConfigError

MAX_SOCKET_PATH_BYTES: Final = 107
"""``sockaddr_un.sun_path`` holds 108 bytes, the last of which is the terminator."""

LOG_TAIL_LINES: Final = 10
_LOG_TAIL_BYTES: Final = 4096


@dataclass(frozen=True)
class MachinePaths:
    """The files of one machine; computed, never stored."""

    home: Path
    """The machine's own folder, mode 0700."""
    ram: Path
    """Guest memory, mode 0600, of machines whose memory is a file with a name."""

    @classmethod
    def of(cls, root: Path, ram_root: Path, *, name: str, uuid: str) -> MachinePaths:
        """The paths of the machine ``name``.

        Raises:
            ConfigError: a socket's path would be longer than Linux allows.
        """
        paths = cls(home=root / name, ram=ram_root / f"{uuid}.ram")
        longest = os.fsencode(paths.state_socket)
        if len(longest) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"run_dir is too long: the socket {paths.state_socket} has {len(longest)} bytes, "
                f"and Linux allows {MAX_SOCKET_PATH_BYTES}",
                field="run_dir",
                remedy="Set run_dir to a shorter path, or give the machine a shorter name.",
            )
        return paths

    @property
    def spec(self) -> Path:
        """The machine's description."""
        return self.home / "spec.toml"

    @property
    def process(self) -> Path:
        """Which process runs the machine."""
        return self.home / "process.json"

    @property
    def qmp(self) -> Path:
        """The socket on which the machine takes commands."""
        return self.home / "qmp.sock"

    @property
    def observer(self) -> Path:
        """A second such socket, for questions only: QEMU serves one client at a time on each."""
        return self.home / "watch.sock"

    @property
    def state_socket(self) -> Path:
        """The socket through which device state comes and goes; it exists only meanwhile."""
        return self.home / "device-state.sock"

    @property
    def serial_socket(self) -> Path:
        """The socket that leads to the guest's serial port, of machines whose port leads to one."""
        return self.home / "serial.sock"

    @property
    def agent_socket(self) -> Path:
        """The socket that leads to the guest's agent, of machines that have a channel for one."""
        return self.home / "agent.sock"

    @property
    def metadata_socket(self) -> Path:
        """The socket at which the hypervisor hands on what its guest asks the metadata service."""
        return self.home / "metadata.sock"

    @property
    def stream_socket(self) -> Path:
        """The socket of the hypervisor's own migration stream; it exists until both ends have met."""
        return self.home / "stream.sock"

    @property
    def serial(self) -> Path:
        """What the guest wrote to its serial port."""
        return self.home / "serial.log"

    @property
    def log(self) -> Path:
        """What the machine's process wrote to its standard output and error."""
        return self.home / "machine.log"

    def log_tail(self) -> str:
        """The last lines of the machine's log, for error messages; empty if there is none."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-LOG_TAIL_LINES:])


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step, mode 0600.

    It is not synced to disk: it says something about a process, and what a crash of the host could take from
    it the same crash takes from the process.
    """
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)
