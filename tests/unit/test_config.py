"""The configuration of a host: it is read as it was written, and a wrong list is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmferry.config import HostConfig, load_config, render_config
from vmferry.errors import ConfigError


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    """Lists of paths and of names are read back, empty ones too."""
    file = tmp_path / "host.toml"
    for config in (
        HostConfig(),
        HostConfig(
            image_roots=(Path("/a"), Path("/b c")), qemu_binaries=(), taps=("tap0", "tap1"), draining=True
        ),
        HostConfig(huge_dir=Path("/dev/hugepages/vmferry"), trace_dir=Path()),
        HostConfig(image_roots=(Path("/a"), Path("/b c")), qemu_binaries=(), taps=("tap0", "tap1")),
    ):
        file.write_text(render_config(config), encoding="utf-8")
        assert load_config(file) == config


def test_the_documented_limits_are_those_of_the_code() -> None:
    """Every setting in the table of docs/operations.md exists, with the default that is named there."""
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    table = text.split("## Limits for all migrations of a host")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `?\"?([\w.]+)", table, re.MULTILINE)
    assert len(rows) > 10
    for name, default in rows:
        assert f"{getattr(HostConfig(), name):{'g' if name.endswith('_s') else ''}}" == default, name


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("max_bandwidth_bytes_per_s = 1000", "max_bandwidth_bytes_per_s"),
        ("switchover_bandwidth_bytes_per_s = -1", "switchover_bandwidth_bytes_per_s"),
        ("max_downtime_ms = 100", "max_downtime_ms"),
        ('on_no_convergence = "hope"', "on_no_convergence"),
        ("max_throttle_percent = 96", "max_throttle_percent"),
        ("no_progress_per_gib_s = 0", "no_progress_per_gib_s"),
        ("chunk_bytes = 4194304", "chunk_bytes"),
        ("chunk_bytes = 6000", "chunk_bytes"),
    ],
)
def test_limits_that_cannot_be_meant_are_refused(tmp_path: Path, line: str, field: str) -> None:
    """The error names the setting."""
    file = tmp_path / "host.toml"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert caught.value.field == field


def test_relative_roots_are_beside_the_file(tmp_path: Path) -> None:
    """A path in a list means what a single path means."""
    file = tmp_path / "host.toml"
    file.write_text('image_roots = ["images", "/srv"]\n', encoding="utf-8")
    assert load_config(file).image_roots == (tmp_path / "images", Path("/srv"))


@pytest.mark.parametrize("value", ['"/srv"', "[1]", '[["/srv"]]', "true"])
def test_a_list_of_something_else_is_refused(tmp_path: Path, value: str) -> None:
    """The error names the setting."""
    file = tmp_path / "host.toml"
    file.write_text(f"image_roots = {value}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="image_roots") as caught:
        load_config(file)
    assert caught.value.field == "image_roots"
