"""Containers as deploy/compose.yaml describes them, run by podman.

Promise: what a test makes has a name of that test's, and is removed when it ends, however it ends: containers,
volumes, networks, and the image that was built for it. Only what the build of images keeps by design stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import wait_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
PODMAN = ("podman", "--runtime", "runc")
BOUNDS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
"""Podman would raise them beyond what a container within a container may have."""
READY_S = 60.0


def run(*command: str, check: bool = True, timeout_s: float = 120.0) -> str:
    """Run a command; returns what it printed, fails with what it complained of."""
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False
    )
    if check and done.returncode:
        pytest.fail(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout.strip()


def podman(*arguments: str, check: bool = True, timeout_s: float = 120.0) -> str:
    """Run a command of podman."""
    return run(*PODMAN, *arguments, check=check, timeout_s=timeout_s)


@contextlib.contextmanager
def built_image(shared: Path) -> Iterator[str]:
    """The image, built from this checkout and removed at the end; or the one that VMFERRY_IMAGE names.

    Processes that test together share one: the first builds it, and the last removes it. ``shared`` is their folder.
    """
    if named := os.environ.get("VMFERRY_IMAGE"):
        yield named
        return
    tag = f"localhost/vmferry-test:{os.environ.get('PYTEST_XDIST_TESTRUNUID') or secrets.token_hex(4)}"
    users = shared / "users-of-the-image"
    users.mkdir(exist_ok=True)
    mine = users / secrets.token_hex(4)
    try:
        with _alone(shared):
            mine.touch()
            if subprocess.run([*PODMAN, "image", "exists", tag], check=False).returncode:
                run(sys.executable, str(ROOT / "scripts/image.py"), "--tag", tag, timeout_s=580)
        yield tag
    finally:
        with _alone(shared):
            mine.unlink()
            if not any(users.iterdir()):
                podman("rmi", "--force", tag, check=False)


@contextlib.contextmanager
def _alone(shared: Path) -> Iterator[None]:
    with (shared / "image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Container:
    """One container, which may be running or not."""

    name: str

    def inspect(self, what: str) -> str:
        """A field of what podman knows of it."""
        return podman("inspect", "--format", f"{{{{{what}}}}}", self.name)

    @property
    def pid(self) -> int:
        """Its first process."""
        return int(self.inspect(".State.Pid"))

    @property
    def root(self) -> Path:
        """Its files, as it sees them, while it runs."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def address(self) -> str:
        """Where it is in its network."""
        (network,) = json.loads(podman("inspect", self.name))[0]["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])

    def exec(self, *command: str, check: bool = True) -> str:
        """Run a command in it."""
        return podman("exec", self.name, *command, check=check)

    def kill(self) -> None:
        """Pull its plug: nothing in it gets to say anything."""
        podman("kill", "--signal", "KILL", self.name)
        podman("wait", self.name)

    def start(self) -> None:
        """Start it again."""
        podman("start", self.name)

    def logs(self) -> str:
        """What it wrote."""
        done = subprocess.run([*PODMAN, "logs", self.name], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def wait_healthy(self) -> None:
        """Wait until its own health check says so."""

        def healthy() -> bool:
            asked = subprocess.run(
                [*PODMAN, "healthcheck", "run", self.name], capture_output=True, check=False
            )
            return asked.returncode == 0

        try:
            wait_until(healthy, seconds=READY_S, what=f"{self.name} is healthy")
        except BaseException:
            print(self.logs()[-4000:])
            raise

    def set_link(self, state: str) -> None:
        """Take its network card ``down``, or bring it ``up``."""
        run("nsenter", "--target", str(self.pid), "--net", "ip", "link", "set", "eth0", state)


class Fleet:
    """The containers, volumes and network of one file of compose."""

    def __init__(self, image: str) -> None:
        self.mark = f"vf-{secrets.token_hex(3)}"
        self.image = image
        self.containers: dict[str, Container] = {}

    def volume(self, name: str) -> Path:
        """Where a volume lies on this computer."""
        return Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", f"{self.mark}-{name}"))

    def create_all(self) -> None:
        """Make the network and the volumes."""
        podman("network", "create", self.mark)
        for name in COMPOSE["volumes"]:
            podman("volume", "create", f"{self.mark}-{name}")

    def run(self, name: str, *extra: str, image: str = "", command: list[str] | None = None) -> Container:
        """Run a service as the file of compose says; ``extra`` goes to podman, the others replace what it says."""
        service = COMPOSE["services"][name]
        container = Container(f"{self.mark}-{name}")
        waits = "no" in str(service.get("restart"))  # it does one thing and ends
        self.containers[name] = container
        podman(
            *("run", *([] if waits else ["--detach"]), "--name", container.name, *BOUNDS),
            *self._options(name, service),
            *extra,
            image or self.image,
            *(command if command is not None else service.get("command", [])),
        )
        return container

    def remove_all(self) -> list[str]:
        """Remove everything; returns what could not be removed."""
        for container in self.containers.values():
            podman("rm", "--force", "--time", "0", "--volumes", container.name, check=False)
        for name in COMPOSE["volumes"]:
            podman("volume", "rm", "--force", f"{self.mark}-{name}", check=False)
        podman("network", "rm", "--force", self.mark, check=False)
        left = [podman(kind, "ls", "--quiet", *more, "--filter", f"name={self.mark}")
                for kind, *more in (("container", "--all"), ("volume",), ("network",))]  # fmt: skip
        return [item for item in left if item]

    def _options(self, name: str, service: dict[str, Any]) -> list[str]:
        """The options of podman for what a service of the file of compose asks for."""
        known = {
            "image", "build", "command", "read_only", "cap_drop", "security_opt", "networks", "network_mode",
            "restart", "stop_grace_period", "shm_size", "tmpfs", "environment", "depends_on", "healthcheck",
            "hostname", "ports", "volumes",
        }  # fmt: skip
        assert set(service) <= known, f"not translated for podman: {set(service) - known}"
        options = []
        if service.get("read_only"):
            options.append("--read-only")
        options += [f"--cap-drop={name}" for name in service.get("cap_drop", [])]
        for option in service.get("security_opt", []):
            key, _, value = option.partition(":") if option.startswith("no-new") else option.partition("=")
            options.append(
                f"--security-opt={key}" if value == "true" else f"--security-opt={key}={DEPLOY / value}"
            )
        options += [f"--tmpfs={mount}" for mount in service.get("tmpfs", [])]
        options += [f"--env={key}={value}" for key, value in service.get("environment", {}).items()]
        for mount in service.get("volumes", []):
            what, _, where = mount.partition(":")
            place = (DEPLOY / what).resolve() if what.startswith(".") else f"{self.mark}-{what}"
            options.append(f"--volume={place}:{where}")
        if "shm_size" in service:
            options.append(f"--shm-size={service['shm_size'].removesuffix('b')}")
        if "hostname" in service:
            options.append(f"--hostname={service['hostname']}")
        network = service.get("network_mode")
        return [
            *options,
            f"--network={network or f'{self.mark}:alias={name}'}",
            *_health(service.get("healthcheck")),
        ]


def _health(check: dict[str, Any] | None) -> list[str]:
    if check is None:
        return ["--no-healthcheck"]
    assert check["test"][0] == "CMD"
    # Asked by the test; here is nobody who would ask at intervals.
    return [f"--health-cmd={json.dumps(check['test'][1:])}", "--health-interval=disable"]
