"""What guests of a comparison have as memory is what was asked for, and is gone afterwards."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.support import require
from vmferry.bench import memory
from vmferry.errors import InvalidArgumentError


def mounted(folder: Path) -> list[str]:
    """The options of what is mounted at a folder."""
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return [options for _, place, _, options, *_ in map(str.split, lines) if place == str(folder)]


@pytest.mark.parametrize("asked", [True, None])
def test_huge_pages_are_a_file_system_of_its_own_for_as_long_as_it_is_needed(asked: bool | None) -> None:
    """It goes with all that is in it, also when the comparison fails."""
    require(os.geteuid() == 0, "file systems can only be mounted by root")
    with contextlib.suppress(KeyError), memory.opened(huge_pages=asked) as found:
        folder = found.folder
        assert found.huge_pages
        (options,) = mounted(folder)
        assert "huge=within_size" in options.split(",")
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "left").write_bytes(b"behind")
        raise KeyError
    assert mounted(folder) == []
    assert not folder.exists()


def test_other_memory_is_the_computers_own() -> None:
    """Nothing is mounted for it."""
    with memory.opened(huge_pages=False) as found:
        assert found == memory.GuestMemory(Path("/dev/shm"), huge_pages=False)


def test_who_may_not_mount_is_told_the_option_and_has_memory_as_it_is_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With what else can be done, and no folder is left."""
    refuses = tmp_path / "mount"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="No such file"), memory.opened(huge_pages=True):
        pass
    refuses.write_text("#!/bin/sh\necho 'mount: only root can do that' >&2; exit 1\n", encoding="ascii")
    refuses.chmod(0o755)
    with pytest.raises(InvalidArgumentError, match="only root") as refused, memory.opened(huge_pages=True):
        pass
    assert refused.value.field == "--huge-pages"
    with memory.opened() as found:
        assert not found.huge_pages
    assert list(tmp_path.iterdir()) == [refuses]
