"""The release before this one: its tree, taken from the repository's history, and services that are of it."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.integration.services import Service

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "protos/vmferry/v1/journal.proto"


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the commit before the journals' schema was last changed."""
    try:
        changed = _git("log", "-1", "--format=%H", "--", SCHEMA).decode().strip()
        archive = _git("archive", f"{changed}^", "vmferry", "source_svc", "dest_svc")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the repository's history is not here")
    folder = tmp_path_factory.mktemp("release-before")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    assert b"UPDATE_BEGUN" not in (folder / "vmferry/v1/journal_pb2.py").read_bytes()
    return folder


def _environment(service: Service) -> bytes:
    return Path(f"/proc/{service.pid}/environ").read_bytes()


async def as_before(before: Path, *services: Service) -> None:
    """Let services be those of the release before."""
    for service in services:
        service.environment["PYTHONPATH"] = str(before)
        await service.restart()
        assert f"PYTHONPATH={before}".encode() in _environment(service)


async def as_now(*services: Service) -> None:
    """Let services be those of this release."""
    for service in services:
        service.environment.clear()
        await service.restart()
