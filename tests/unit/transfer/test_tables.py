"""The table that a service keeps of a machine's pages: where it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmferry.memory.digest import DIGEST_SIZE, PageTable
from vmferry.transfer.tables import page_table

PAGES = 2**20
"""Those of 4 GiB, which is more than what a service keeps digests of in memory."""


def fill(table: PageTable) -> None:
    """Note something in every part of it."""
    for page in range(0, PAGES, 4096):
        table.note_digests([(page, 1)], b"x" * DIGEST_SIZE)


def files_in(folder: Path) -> list[str]:
    """What this process has open there."""
    found = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    return [name for name in found if name.startswith(f"{folder}/")]


def test_what_is_too_much_lies_in_the_hosts_folder_without_a_name(tmp_path: Path) -> None:
    """And is gone with the table."""
    table = page_table(PAGES, tmp_path)
    assert files_in(tmp_path) == []
    fill(table)
    (found,) = files_in(tmp_path)
    assert found.endswith(" (deleted)")
    assert list(tmp_path.iterdir()) == []
    del table
    assert files_in(tmp_path) == []


def test_a_disk_that_takes_nothing_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the folder and the reason; the digests are kept."""
    table = page_table(PAGES, tmp_path / "missing")
    fill(table)
    assert table.get(PAGES - 4096) == b"x" * DIGEST_SIZE
    (told,) = [str(record.msg) for record in caplog.records]
    assert "digests of pages are kept in memory" in told
    assert str(tmp_path / "missing") in told
    assert "No such file or directory" in told
