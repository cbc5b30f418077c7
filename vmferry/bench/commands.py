"""The system's own programs, run for a comparison.

Promise: what fails is told as the fault of the option that asked for it, in the program's own words.
"""

from __future__ import annotations

import subprocess
from typing import Final

from vmferry.errors import InvalidArgumentError

COMMAND_S: Final = 20


def run(*command: str, option: str, remedy: str = "") -> str:
    """Run a program to its end; returns what it printed.

    Raises:
        InvalidArgumentError: by the option, if there is no such program, or it failed.
    """
    try:
        return subprocess.run(  # noqa: S603 - fixed programs, arguments made here
            command, check=True, capture_output=True, text=True, timeout=COMMAND_S
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        told = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise InvalidArgumentError(
            f"'{' '.join(command)}' failed: {told}", field=option, remedy=remedy
        ) from error
