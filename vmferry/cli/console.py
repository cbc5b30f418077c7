"""A terminal at a machine's serial port.

Promise: what is typed goes to the guest as it is, what the guest writes is shown as it is, until the key that leaves,
the end of input, or the end of the machine; the terminal is then as it was before.
"""

from __future__ import annotations

import os
import select
import socket
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vmferry.errors import MachineFailedError

LEAVE: Final = b"\x1d"
"""What Ctrl-] sends."""

_PART_BYTES: Final = 4096


def attach(path: Path, keyboard: int, screen: int) -> None:
    """Connect two descriptors to the socket of a serial port.

    Raises:
        MachineFailedError: the socket cannot be reached.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as port:
        try:
            port.connect(os.fspath(path))
        except OSError as error:
            raise MachineFailedError(
                f"the serial port at {path} cannot be reached: {error.strerror}"
            ) from error
        with _raw(keyboard):
            _carry(port, keyboard, screen)


def _carry(port: socket.socket, keyboard: int, screen: int) -> None:
    while True:
        ready, _, _ = select.select([port.fileno(), keyboard], [], [])
        if port.fileno() in ready:
            shown = port.recv(_PART_BYTES)
            if not shown:
                return
            while shown:
                shown = shown[os.write(screen, shown) :]
        if keyboard in ready:
            typed, leave, _ = os.read(keyboard, _PART_BYTES).partition(LEAVE)
            port.sendall(typed)
            if leave or not typed:
                return


@contextmanager
def _raw(keyboard: int) -> Iterator[None]:
    """Have a terminal hand over every key at once; anything else is left as it is."""
    if not os.isatty(keyboard):
        yield
        return
    before = termios.tcgetattr(keyboard)
    try:
        tty.setraw(keyboard)
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
