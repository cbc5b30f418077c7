"""``vmferry probe``: what it says of the folder that guest memory lies in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hugepages import huge_tmpfs, small_tmpfs
from vmferry.cli.main import run
from vmferry.errors import ExitCode


def _said(tmp_path: Path, ram_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What is said of a host with its guest memory there."""
    config = tmp_path / "host.toml"
    config.write_text(f'ram_dir = "{ram_dir}"\n', encoding="utf-8")
    assert run(["probe", "--config", str(config), "--json"]) == ExitCode.OK
    said: dict[str, Any] = json.loads(capsys.readouterr().out)["huge_pages"]
    return said


def test_huge_pages_are_found_where_a_folder_is_going_to_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is not there yet; nothing is left behind."""
    with huge_tmpfs() as mounted:
        said = _said(tmp_path, mounted / "vmferry" / "ram", capsys)
        assert said == {"folder": str(mounted), "usable": True, "reason": "one byte took 2048 KiB of memory"}
        assert list(mounted.iterdir()) == []


def test_small_pages_are_told_with_what_may_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the document, and in the table for people."""
    with small_tmpfs() as mounted:
        said = _said(tmp_path, mounted, capsys)
        assert (said["folder"], said["usable"]) == (str(mounted), False)
        assert said["reason"].startswith("one byte took 4 KiB of memory; ")
        assert "huge=within_size" in said["reason"]
        assert run(["probe", "--config", str(tmp_path / "host.toml")]) == ExitCode.OK
        assert said["reason"] in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["/proc/sys", "/" + "x" * 300], ids=["not writable", "no name of a file"])
def test_a_folder_that_takes_no_files_is_told(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even by root, or not to be looked for."""
    said = _said(tmp_path, Path(folder), capsys)
    assert (said["folder"], said["usable"]) == (folder, False)
    assert said["reason"].startswith("no file can be written: ")
