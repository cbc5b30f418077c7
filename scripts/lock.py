"""Rewrite constraints.txt with the newest versions that pyproject.toml allows, of everything incl. what it pulls in.

Promise: what is written was resolved by pip in a clean environment from pyproject.toml alone, by the oldest Python
supported, which is the one that needs most. Neither the present constraints.txt nor ``.venv`` has any influence.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
HEADER: Final = """\
# Exact versions of everything that vmferry and its development tools need. Made by `make lock`; do not edit.
"""


def main() -> None:
    """Resolve and write."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    oldest = project["requires-python"].removeprefix(">=")
    if oldest != f"{sys.version_info.major}.{sys.version_info.minor}":
        sys.exit(f"Lock with the oldest Python supported: make lock PYTHON=python{oldest}")
    with tempfile.TemporaryDirectory(prefix="vmferry-lock-") as directory:
        pins = resolve(Path(directory), project["name"])
    (ROOT / "constraints.txt").write_text(HEADER + "".join(f"{pin}\n" for pin in pins), encoding="utf-8")


def resolve(directory: Path, project: str) -> list[str]:
    """What pip would install for the project and its ``dev`` group into an empty environment, without the project."""
    python = directory / "venv/bin/python"
    report = directory / "report.json"
    pip = [str(python), "-I", "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input", "install"]
    resolution = ["--dry-run", "--ignore-installed", "--report", str(report), "--group", "dev", "."]
    for command in (
        [sys.executable, "-I", "-m", "venv", str(directory / "venv")],
        [*pip, "--upgrade", "pip"],
        [*pip, *resolution],
    ):
        subprocess.run(command, check=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    pins = {
        item["name"].lower().replace("_", "-"): item["version"] for item in found if item["name"] != project
    }
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


if __name__ == "__main__":
    main()
