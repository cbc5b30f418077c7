"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.cli.fake_source import HOST_A, FakeSource
from vmferry.cli import main
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificates of host a, another host and an operator."""
    root = tmp_path_factory.mktemp("certificates")
    init_authority(root / "ca", "test.example")
    for kind, name in (("vmhost", "a"), ("vmhost", "other"), ("admin", "operator")):
        issue(root / "ca", Identity.parse(f"spiffe://test.example/{kind}/{name}"), root / name)
    return root


@pytest.fixture
def source(certificates: Path) -> Iterator[FakeSource]:
    """A source service of host a."""
    fake = FakeSource(certificates / "a")
    yield fake
    fake.close()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process."""
    for name in ("VMFERRY_SOURCE", "VMFERRY_SOURCE_HOST", "VMFERRY_HOSTS", "VMFERRY_TLS", "VMFERRY_CONFIG"):
        monkeypatch.delenv(name, raising=False)

    def run_command(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run_command


@pytest.fixture
def call(run: Run, source: FakeSource, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line with the fake source in the environment, as an operator would have it."""
    monkeypatch.setenv("VMFERRY_SOURCE", source.address)
    monkeypatch.setenv("VMFERRY_SOURCE_HOST", HOST_A)
    monkeypatch.setenv("VMFERRY_TLS", str(certificates / "operator"))
    return run
