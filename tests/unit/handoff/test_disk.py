"""The calls by which journals reach a disk: what is read is what is there, and what is closed is given back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from vmferry.handoff.disk import DISK, HostFile

_CLOSES: Final = """
import os, sys
from pathlib import Path
from vmferry.handoff.disk import DISK
os.close(0)
file = DISK.open(Path(sys.argv[1]))
file.close()
print(Path("/proc/self/fd/0").is_symlink())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with ten bytes."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    return path


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, -1, b"0123456789"),
        (4, -1, b"456789"),
        (4, 3, b"456"),
        (8, 5, b"89"),
        (4, 0, b""),
        (10, -1, b""),
        (12, -1, b""),
        (12, 3, b""),
    ],
)
def test_as_much_is_read_as_was_asked_for(path: Path, offset: int, length: int, expected: bytes) -> None:
    """Less only where the file ends; nothing if nothing was asked for."""
    with closing(DISK.open(path)) as file:
        assert file.read(offset, length) == expected


def test_a_file_that_is_closed_is_given_back_once(path: Path) -> None:
    """Its number may be another file's by the second time."""
    file = DISK.open(path)
    assert isinstance(file, HostFile)
    number = file._fd
    file.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(number)
    taken = os.open(path, os.O_RDONLY)
    try:
        assert taken == number  # the lowest one that is free
        file.close()
        os.fstat(taken)
    finally:
        os.close(taken)


def test_a_service_without_standard_input_gives_its_files_back(path: Path) -> None:
    """The first file that it opens has the number 0, and is a file like any other."""
    done = subprocess.run([sys.executable, "-c", _CLOSES, path], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
