"""What a destination refuses of a description: files outside of its roots, however they are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dest_svc.admission import refusals
from vmferry.config import HostConfig
from vmferry.machines.qemu.spec import NicSpec, QemuSpec
from vmferry.machines.spec import new_qemu_spec

MAC = "52:54:00:12:34:56"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for machines' files, with a kernel; beside it lies a secret."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "vmlinuz").write_bytes(b"kernel")
    (folder / "folder").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "escape").symlink_to(tmp_path / "secret")
    (folder / "escape-folder").symlink_to(tmp_path)
    (folder / "inside").symlink_to("vmlinuz")
    (tmp_path / "way-in").symlink_to(folder)
    return folder


def found(root: Path, config: dict[str, Any] | None = None, **part: Any) -> list[tuple[str, str]]:
    """Ids and fields of everything that is refused, but what the hypervisor itself cannot do."""
    spec = new_qemu_spec("web", 16, 1, QemuSpec(**{"machine": "pc-q35-7.2", "accelerator": "tcg", **part}))
    host = HostConfig(image_roots=(root,), **(config or {}))
    told = list(refusals(spec, host))
    assert all(refusal.message and refusal.remedy for refusal in told)
    assert all(refusal.error().field == f"spec.{refusal.field}" for refusal in told)
    return [
        (refusal.id, refusal.field) for refusal in told if refusal.id.split(".")[0] in {"file", "network"}
    ]


@pytest.mark.parametrize("name", ["images/vmlinuz", "images/inside", "way-in/vmlinuz"])
def test_a_file_below_a_root_is_let_in(root: Path, name: str) -> None:
    """Also through links that stay below it or lead there."""
    assert found(root, kernel=str(root.parent / name)) == []


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("secret", "file.outside-roots"),
        ("missing", "file.outside-roots"),
        ("images/escape", "file.outside-roots"),
        ("images/escape-folder/secret", "file.outside-roots"),
        ("images/missing", "file.missing"),
        ("images/folder", "file.not-regular"),
        ("images/vmlinuz/x", "file.missing"),
    ],
)
def test_a_file_elsewhere_is_refused(root: Path, name: str, refusal: str) -> None:
    """By its place after all links are followed; whether a file elsewhere exists is not told."""
    for field in ("kernel", "firmware"):
        assert found(root, **{field: str(root.parent / name)}) == [(refusal, f"qemu.{field}")]


def test_only_named_taps_may_be_used(root: Path) -> None:
    """A tap that the configuration does not name is refused, and one that is not there is told."""
    nics = (NicSpec(backend="user", mac=MAC), NicSpec(backend="tap", tap="vf-none", mac=MAC))
    assert found(root, nics=nics) == [("network.not-allowed", "qemu.nics[1].tap")]
    assert found(root, {"taps": ("vf-none",)}, nics=nics) == [("network.missing", "qemu.nics[1].tap")]


@pytest.mark.parametrize(
    ("part", "refusal"),
    [
        ({"binary": "/bin/sh"}, "hypervisor.not-allowed"),
        ({"machine": "q35"}, "machine.unresolved"),
        ({"accelerator": "auto"}, "machine.unresolved"),
    ],
)
def test_no_other_program_is_started_or_asked(root: Path, part: dict[str, str], refusal: str) -> None:
    """A binary that is not configured is not even probed; what is not resolved is not guessed."""
    spec = new_qemu_spec("web", 16, 1, QemuSpec(**{"machine": "pc-q35-7.2", "accelerator": "tcg", **part}))
    assert [one.id for one in refusals(spec, HostConfig(image_roots=(root,)))] == [refusal]


def test_a_missing_hypervisor_is_told(root: Path) -> None:
    """A binary that is configured and not installed makes the kind one that this host cannot run."""
    spec = new_qemu_spec(
        "web", 16, 1, QemuSpec(machine="pc-q35-7.2", accelerator="tcg", binary="/nonexistent/qemu")
    )
    config = HostConfig(image_roots=(root,), qemu_binaries=(Path("/nonexistent/qemu"),))
    assert [one.id for one in refusals(spec, config)] == ["machine.kind-unsupported"]
