"""What is installed is what was meant: bounded and pinned dependencies, a whole wheel, commands that start."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import vmferry
from tests.support import require

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
DECLARED = [
    Requirement(line)
    for line in (
        *PYPROJECT["build-system"]["requires"],
        *PROJECT["dependencies"],
        *PYPROJECT["dependency-groups"]["dev"],
    )
]
SUPPORTED = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line]


def pins() -> dict[str, Version]:
    """The versions of constraints.txt, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def needed(python: str) -> Iterator[Requirement]:
    """Every requirement that holds for ``python``, of the project and of all that it pulls in, as installed here."""
    todo, done = list(DECLARED), set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        yield requirement
        if key in done:
            continue
        done.add(key)
        for line in importlib.metadata.requires(requirement.name) or ():
            child = Requirement(line)
            environments = [
                {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
                for extra in ("", *requirement.extras)
            ]
            if child.marker is None or any(
                child.marker.evaluate(environment) for environment in environments
            ):
                todo.append(child)


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_every_dependency_is_bounded(requirement: Requirement) -> None:
    """No release that nobody here has tried can come in by itself."""
    operators = {clause.operator for clause in requirement.specifier}
    assert operators in ({"=="}, {">=", "<"})


@pytest.mark.parametrize("python", SUPPORTED)
def test_pins_satisfy_everything(python: str) -> None:
    """constraints.txt has a version for every package that any supported Python needs, within all bounds on it."""
    pinned = pins()
    try:
        wanted = list(needed(python))
    except importlib.metadata.PackageNotFoundError as missing:
        require(None, f"{missing.name} is not installed; make setup installs it")
    unfit = [
        str(requirement)
        for requirement in wanted
        if (version := pinned.get(canonicalize_name(requirement.name))) is None
        or not requirement.specifier.contains(version, prereleases=True)
    ]
    assert unfit == []


def test_oldest_python_is_the_one_supported_first() -> None:
    """The bound, the classifiers and the versions that ruff and the lock assume name the same oldest Python."""
    assert PROJECT["requires-python"] == f">={SUPPORTED[0]}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{SUPPORTED[0].replace('.', '')}"


def test_one_version() -> None:
    """The package says the version under which it is published, and the changelog knows it."""
    assert vmferry.__version__ == PROJECT["version"]
    assert f"[{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from this checkout."""
    require(importlib.util.find_spec("hatchling"), "hatchling is not installed; make setup installs it")
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_everything_that_runs(wheel_names: set[str]) -> None:
    """Each module, generated stub, guest program and the typing marker is in the wheel."""
    files = [
        path for package in ("vmferry", "source_svc", "dest_svc") for path in (ROOT / package).rglob("*")
    ]
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.suffix in {".py", ".pyi", ".bin", ".html", ".css", ".js", ".svg"}
        and "__pycache__" not in path.parts
    }
    assert any(name.endswith(".bin") for name in wanted)
    assert wanted | {"vmferry/py.typed"} <= wheel_names


def test_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    """Users get neither tests nor scripts, only the three packages and the metadata with the licence."""
    metadata = f"vmferry-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in wheel_names} == {"vmferry", "source_svc", "dest_svc", metadata}
    assert f"{metadata}/licenses/LICENSE" in wheel_names


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_command_starts(command: str) -> None:
    """The console script finds its function and explains itself, in a process of its own."""
    module, function = PROJECT["scripts"][command].split(":")
    program = f"import sys; from {module} import {function}; sys.exit({function}())"
    result = subprocess.run(
        [sys.executable, "-c", program, "--help"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()
