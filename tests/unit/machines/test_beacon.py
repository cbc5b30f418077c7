"""Beacons: seen only where they were put, whatever lies in their place and whatever a source says their name is."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from vmferry.machines.beacon import Beacon, beacon_problem, make_beacon

OTHER = f".vmferry-{'0' * 32}.beacon"


def problem(beacon: Beacon, folder: Path, name: str = "", sha256: bytes = b"") -> str:
    """What is found of a beacon in a folder."""
    return beacon_problem(folder, name or beacon.name, sha256 or beacon.sha256, device=folder.stat().st_dev)


def test_a_beacon_is_seen_where_it_stands_and_nowhere_else(tmp_path: Path) -> None:
    """Only its owner may read it; taken away, which may be done twice, nothing is left."""
    (tmp_path / "other").mkdir()
    beacon = make_beacon(tmp_path)
    assert (tmp_path / beacon.name).stat().st_mode & 0o777 == 0o600
    assert problem(beacon, tmp_path) == ""
    assert "cannot be read here: No such file" in problem(beacon, tmp_path / "other")
    beacon.remove()
    beacon.remove()
    assert "cannot be read here" in problem(beacon, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_two_beacons_have_nothing_in_common(tmp_path: Path) -> None:
    """Neither name nor content can be known before."""
    one, two = make_beacon(tmp_path), make_beacon(tmp_path)
    assert one.name != two.name
    assert one.sha256 != two.sha256
    assert "not the one" in problem(one, tmp_path, two.name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../secret",
        "secret",
        "/etc/passwd",
        f"sub/{OTHER}",
        f"{OTHER}\n",
        OTHER.upper(),
        f"{OTHER}x",
        "\0",
    ],
)
def test_no_other_name_is_looked_at(tmp_path: Path, name: str) -> None:
    """A path, a link's way out, or any other file is refused by its name, also if its content is known."""
    content = b"s" * 32
    (tmp_path / "secret").write_bytes(content)
    assert "shows no beacon" in beacon_problem(
        tmp_path, name, hashlib.sha256(content).digest(), device=tmp_path.stat().st_dev
    )


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "huge", "empty", "device"])
def test_what_is_no_beacon_is_not_read(tmp_path: Path, kind: str) -> None:
    """A link, a pipe nobody writes to, a file of another size: each is told, and does not hold anybody up."""
    content, path = b"s" * 32, tmp_path / OTHER
    (tmp_path / "secret").write_bytes(content)
    match kind:
        case "link":
            path.symlink_to("secret")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "huge":
            with path.open("wb") as file:
                file.write(content)
                file.truncate(1 << 40)
        case "empty":
            path.touch()
        case "device":
            path.symlink_to("/dev/zero")
    began = time.monotonic()
    sha256 = hashlib.sha256(content).digest()
    assert beacon_problem(tmp_path, OTHER, sha256, device=tmp_path.stat().st_dev)
    assert time.monotonic() - began < 5


def test_a_file_that_is_mounted_over_its_name_is_not_shown_by_what_lies_beside_it(tmp_path: Path) -> None:
    """The beacon lies on the folder's device, the image on another."""
    beacon = make_beacon(tmp_path)
    found = beacon_problem(tmp_path, beacon.name, beacon.sha256, device=beacon.device + 1)
    assert "mounted over" in found


def test_what_a_killed_source_left_goes_with_the_next_beacon(tmp_path: Path) -> None:
    """Old beacons are removed, and nothing else, however it is named or dated."""
    forgotten, fresh = make_beacon(tmp_path), make_beacon(tmp_path)
    (tmp_path / "disk.raw").touch()
    (tmp_path / OTHER).mkdir()
    for name in (forgotten.name, "disk.raw", OTHER):
        os.utime(tmp_path / name, (0, 0))
    last = make_beacon(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {fresh.name, last.name, "disk.raw", OTHER}


def test_a_folder_that_takes_no_beacon_is_told(tmp_path: Path) -> None:
    """As the error of the system, with nothing left."""
    with pytest.raises(OSError, match="No such file"):
        make_beacon(tmp_path / "missing")
