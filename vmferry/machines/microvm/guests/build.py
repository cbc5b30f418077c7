"""Assemble all guest programs: ``python -m vmferry.machines.microvm.guests.build [--check]``.

With ``--check`` nothing is written; the exit code is 1 if a committed image is not what its source gives.
Needs GNU ``as`` and ``objcopy``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from vmferry.machines.microvm.guests import PROGRAMS, SOURCES
from vmferry.machines.qemu.guest import LOAD

IMAGES = (*(program.image_path for program in PROGRAMS.values()), LOAD)


def assemble(image_path: Path) -> bytes:
    """What the image at a path is to be, made from the source beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        compiled, image = Path(scratch, "program.o"), Path(scratch, "program.bin")
        source = image_path.with_suffix(".S")
        # --fatal-warnings: an assembler that has to guess is wrong here.
        _run("as", "--64", "--fatal-warnings", "-I", str(SOURCES), "-o", str(compiled), str(source))
        _run("objcopy", "-O", "binary", "-j", ".text", str(compiled), str(image))
        return image.read_bytes()


def main() -> int:
    """Build or check all programs; the exit code."""
    parser = argparse.ArgumentParser(description="Assemble the guest programs.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if an image is out of date")
    check = parser.parse_args().check
    outdated = [path for path in IMAGES if not _up_to_date(path, assemble(path), write=not check)]
    for path in outdated if check else ():
        sys.stderr.write(f"{path} is not what {path.stem}.S gives: build it again\n")
    return 1 if check and outdated else 0


def _up_to_date(path: Path, image: bytes, *, write: bool) -> bool:
    if path.exists() and path.read_bytes() == image:
        return True
    if write:
        path.write_bytes(image)
    return False


def _run(*command: str) -> None:
    subprocess.run(command, check=True)  # noqa: S603 - fixed programs, arguments made here


if __name__ == "__main__":
    sys.exit(main())
