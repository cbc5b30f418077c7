"""Make the virtual environment in which every make target works, or leave it alone if it is right already.

Promise: afterwards ``.venv`` holds this checkout (editable) and its development tools in exactly the versions of
constraints.txt. Needs nothing but the standard library. pip asks whatever index the user has configured. A second
run with nothing changed compares a fingerprint, and compiles the sources that changed: every service, machine and
command is a process of its own, and where the environment forbids Python to keep byte code (as in many containers)
each would compile everything again, a third of its start. An environment of another interpreter, of other
requirements, or copied from another place is made anew, never repaired. Commands named as arguments are installed
instead, where the system lacks them and nobody has to be asked; where that is not so, it says so and whoever needs
them decides.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this file is what tells the user of an older interpreter
    sys.exit(
        f"vmferry needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}. "
        "Name a newer one: make PYTHON=python3.12 ..."
    )

import compileall
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Final, NoReturn

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = ROOT / ".venv"
STAMP: Final = VENV / ".fingerprint"
CONSTRAINTS: Final = ROOT / "constraints.txt"
PACKAGES: Final = ("vmferry", "source_svc", "dest_svc")
# The interpreter beneath an active virtual environment: that environment may be the very one to be replaced.
BASE_PYTHON: Final = Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def main() -> None:
    """Bring the environment up to date, and do nothing at all if it is; or install the named commands."""
    if len(sys.argv) > 1:
        ensure_commands(sys.argv[1:])
        return
    wanted = fingerprint()
    if not STAMP.is_file() or STAMP.read_text(encoding="utf-8") != wanted:
        make_environment(wanted)
    for package in PACKAGES:  # what cannot be compiled or written is left to Python, which tells it better
        compileall.compile_dir(ROOT / package, quiet=2)


def make_environment(wanted: str) -> None:
    """Make the environment anew, and stamp it when it is whole."""
    ensure_venv_module()
    say(f"making {VENV} with Python {sys.version.split()[0]}; this happens once and takes a minute or so")
    if VENV.exists():
        shutil.rmtree(VENV)
    run([str(BASE_PYTHON), "-I", "-m", "venv", str(VENV)], "the virtual environment could not be made")
    # First what builds the checkout, so that the build itself needs no environment of its own with other versions.
    pip_install("pip", "hatchling", "editables")
    pip_install("--no-build-isolation", "--group", "dev", "--editable", ".")
    STAMP.write_text(wanted, encoding="utf-8")
    say("the environment is ready")


def fingerprint() -> str:
    """A digest of everything that decides what the environment must be."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    requirements = [pyproject["build-system"], pyproject["project"], pyproject["dependency-groups"]]
    parts = [
        str(VENV),
        str(BASE_PYTHON),
        f"{sys.version_info.major}.{sys.version_info.minor}",
        json.dumps(requirements, sort_keys=True),
        CONSTRAINTS.read_text(encoding="utf-8"),
        Path(__file__).read_text(encoding="utf-8"),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def ensure_venv_module() -> None:
    """See that this Python can make environments; Debian and Ubuntu ship that in a package of its own."""
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    privilege = root_prefix()
    if shutil.which("apt-get") is None or privilege is None:
        give_up(
            f"{BASE_PYTHON} cannot make virtual environments: its venv or ensurepip module is missing.\n"
            f"Install it (on Debian and Ubuntu: apt-get install {package}) and call make again, "
            "or name another interpreter: make PYTHON=... "
        )
    say(f"installing {package}, without which this Python cannot make virtual environments")
    apt = [*privilege, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    run([*apt, "update"], "the list of system packages could not be fetched")
    run([*apt, "install", "--yes", "--no-install-recommends", package], f"{package} could not be installed")


def ensure_commands(commands: list[str]) -> None:
    """Install the packages that are named like these commands, if one is missing and there is a way."""
    missing = [command for command in commands if shutil.which(command) is None]
    privilege = root_prefix()
    if not missing:
        return
    if shutil.which("apt-get") is None or privilege is None:
        say(f"missing here, and not to be installed without root and apt-get: {', '.join(missing)}")
        return
    say(f"installing {', '.join(missing)}")
    apt = [*privilege, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        if subprocess.run(
            [*apt, *arguments], check=False, stdout=sys.stderr, stdin=subprocess.DEVNULL
        ).returncode:
            say("that failed (see above); going on without")
            return


def root_prefix() -> list[str] | None:
    """The command prefix that gives root's rights without asking anybody; None if there is none."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], check=False, capture_output=True).returncode == 0:
        return [sudo, "-n"]
    return None


def pip_install(*arguments: str) -> None:
    """Install into the environment, held to constraints.txt."""
    pip = [str(VENV / "bin/python"), "-I", "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input"]
    run(
        [*pip, "install", "--constraint", str(CONSTRAINTS), *arguments],
        "pip could not install what vmferry needs; it asks the index that your pip configuration names",
    )


def run(command: list[str], failure: str) -> None:
    """Run ``command`` in the checkout, its output on stderr; give up with ``failure`` if it fails."""
    if subprocess.run(command, check=False, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
        give_up(f"{failure} (see above).")


def say(message: str) -> None:
    """Tell the user on stderr, so that stdout carries only what the make target prints."""
    sys.stderr.write(f"vmferry set-up: {message}\n")
    sys.stderr.flush()


def give_up(message: str) -> NoReturn:
    """End unsuccessfully with a message."""
    sys.exit(f"vmferry set-up: {message}")


if __name__ == "__main__":
    main()
