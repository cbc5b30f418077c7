"""Assemble the guest programs: ``python -m vmferry.machines.microvm.guests.build [--check]``.

With ``--check`` nothing is written; the exit code is 1 if a committed image is not what its source gives.
Needs GNU ``as`` and ``objcopy``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from vmferry.machines.microvm.guests import PROGRAMS, SOURCES, Program


def assemble(program: Program) -> bytes:
    """The image of ``program``, made from its source."""
    with tempfile.TemporaryDirectory() as scratch:
        compiled, image = Path(scratch, "program.o"), Path(scratch, "program.bin")
        source = SOURCES / f"{program.name}.S"
        # --fatal-warnings: an assembler that has to guess is wrong here.
        _run("as", "--64", "--fatal-warnings", "-I", str(SOURCES), "-o", str(compiled), str(source))
        _run("objcopy", "-O", "binary", "-j", ".text", str(compiled), str(image))
        return image.read_bytes()


def main() -> int:
    """Build or check all programs; the exit code."""
    parser = argparse.ArgumentParser(description="Assemble the guest programs of the micro-VM.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if an image is out of date")
    check = parser.parse_args().check
    outdated = [
        program
        for program in PROGRAMS.values()
        if not _up_to_date(program, assemble(program), write=not check)
    ]
    for program in outdated if check else ():
        sys.stderr.write(f"{program.image_path} is not what {program.name}.S gives: build it again\n")
    return 1 if check and outdated else 0


def _up_to_date(program: Program, image: bytes, *, write: bool) -> bool:
    if program.image_path.exists() and program.image_path.read_bytes() == image:
        return True
    if write:
        program.image_path.write_bytes(image)
    return False


def _run(*command: str) -> None:
    subprocess.run(command, check=True)  # noqa: S603 - fixed programs, arguments made here


if __name__ == "__main__":
    sys.exit(main())
