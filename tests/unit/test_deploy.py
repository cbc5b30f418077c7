"""What lies in deploy/ fits the program: the commands, options, settings, ports and users that it names are real."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import require
from vmferry.config import HostConfig, load_config
from vmferry.supervisor import SLACK_S

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
CONTAINERFILE = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS: dict[str, Any] = {
    one["kind"]: one
    for one in yaml.safe_load_all((DEPLOY / "kubernetes/vmferry.yaml").read_text(encoding="utf-8"))
}
POD: dict[str, Any] = MANIFESTS["DaemonSet"]["spec"]["template"]["spec"]
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
USER = "7601"

DANGEROUS = {
    *(
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "setns",
        "unshare",
        "bpf",
        "perf_event_open",
        "keyctl",
        "add_key",
    ),
    *(
        "init_module",
        "finit_module",
        "delete_module",
        "kexec_load",
        "kexec_file_load",
        "reboot",
        "swapon",
        "swapoff",
    ),
    *(
        "setuid",
        "setgid",
        "setreuid",
        "setresuid",
        "setgroups",
        "capset",
        "open_by_handle_at",
        "acct",
        "quotactl",
    ),
    *(
        "io_uring_setup",
        "io_uring_enter",
        "settimeofday",
        "clock_settime",
        "iopl",
        "ioperm",
        "personality",
        "mknod",
    ),
    *(
        "mknodat",
        "process_vm_writev",
        "move_mount",
        "fsopen",
        "request_key",
        "nfsservctl",
        "syslog",
        "sethostname",
    ),
}
"""System calls that nothing here needs, and by which people have left containers."""


def settings(text: str, tmp_path: Path) -> HostConfig:
    """A configuration, read as the services read it: what they do not know is an error."""
    path = tmp_path / "host.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def seconds(text: str) -> float:
    """A time as compose and systemd write it."""
    return float(text.removesuffix("s"))


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.toml")), ids=lambda path: path.name)
def test_every_configuration_is_one(path: Path) -> None:
    """Each setting exists and has a value in its range."""
    load_config(path)


def test_services_may_finish_before_they_are_ended_by_force(tmp_path: Path) -> None:
    """What a manager of containers grants is more than a host takes to stop."""
    grace = seconds(COMPOSE["services"]["a"]["stop_grace_period"])
    for name in ("a", "b"):
        assert load_config(DEPLOY / f"compose/{name}.toml").stop_timeout_s + SLACK_S < grace
    pods = settings(MANIFESTS["ConfigMap"]["data"]["host.toml"], tmp_path)
    assert pods.stop_timeout_s + SLACK_S < POD["terminationGracePeriodSeconds"]


def test_the_pod_names_what_exists(tmp_path: Path) -> None:
    """Commands, ports, volumes, user, configuration: the same as in the image and in the code."""
    (container,) = POD["containers"]
    host = settings(MANIFESTS["ConfigMap"]["data"]["host.toml"], tmp_path)
    probes = [container[name]["exec"]["command"] for name in ("startupProbe", "readinessProbe")]
    for command in (container["command"], *probes):
        assert command[0] in SCRIPTS
        assert command[-2] == "--config"
        assert command[-1] in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(probe[1] == "health" for probe in probes)
    assert "livenessProbe" not in container, "it would end machines"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listening = {
        role: int(address.rpartition(":")[2])
        for role, address in (("source", host.source_listen), ("dest", host.dest_listen))
    }
    assert ports == listening
    volumes = {volume["name"] for volume in POD["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    mounted = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    for needed in (host.tls_dir, host.state_dir, host.run_dir, host.ram_dir, *host.image_roots):
        assert any(needed.is_relative_to(place) for place in mounted), needed
    labels = MANIFESTS["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    assert MANIFESTS["DaemonSet"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {one["metadata"].get("namespace", "vmferry") for one in MANIFESTS.values()} == {"vmferry"}


def test_nobody_is_root_and_nobody_has_a_capability() -> None:
    """Image, compose and pod agree: one user, no capability, no way to more, nothing to write to but volumes."""
    assert f"USER {USER}:{USER}" in CONTAINERFILE
    (container,) = POD["containers"]
    assert str(POD["securityContext"]["runAsUser"]) == str(POD["securityContext"]["fsGroup"]) == USER
    assert POD["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert "cap_add" not in service
        assert service["read_only"]
        assert "no-new-privileges:true" in service["security_opt"]


def test_the_image_runs_what_exists() -> None:
    """The commands of image and compose are commands of this project; each host is checked for its health."""
    commands = re.findall(r"^(?:HEALTHCHECK .*)?CMD (\[.*\])$", CONTAINERFILE, re.MULTILINE)
    assert len(commands) == 2
    assert all(json.loads(command)[0] in SCRIPTS for command in commands)
    for name in ("a", "b"):
        service = COMPOSE["services"][name]
        assert service["healthcheck"]["test"] == ["CMD", "vmferry", "health"]
        for mount in service["volumes"]:
            what = mount.partition(":")[0]
            assert what in COMPOSE["volumes"] or (DEPLOY / what).exists(), mount


def test_each_system_call_that_is_allowed_has_its_reason() -> None:
    """The profile denies by default, names each call once (sockets: by kind), and none that is dangerous."""
    profile = json.loads((DEPLOY / "seccomp.json").read_text(encoding="utf-8"))
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    plain: list[str] = []
    for group in profile["syscalls"]:
        assert group["action"] == "SCMP_ACT_ALLOW"
        assert len(group["comment"]) > 5
        plain += group["names"] if "args" not in group else []
    assert len(plain) == len(set(plain))
    everything = {name for group in profile["syscalls"] for name in group["names"]}
    assert not everything & DANGEROUS
    for limited in ("socket", "userfaultfd"):
        assert limited in everything - set(plain)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_name_what_exists(unit: Path) -> None:
    """The command is one of ours, and machines are left alone; the user is the one that is made."""
    values = dict(
        line.split("=", 1) for line in unit.read_text("utf-8").splitlines() if "=" in line and line[0] != "#"
    )
    command, option, config = values["ExecStart"].split()
    assert Path(command).name in SCRIPTS
    assert (option, config) == ("--config", "/etc/vmferry/host.toml")
    assert (values["Type"], values["KillMode"]) == ("notify", "process")
    assert values["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert seconds(values["WatchdogSec"]) > 1
    assert f"u {values['User']} " in (DEPLOY / "systemd/vmferry.sysusers").read_text(encoding="utf-8")


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """``systemd-analyze verify`` has nothing to say about them, and does about a setting that does not exist."""
    require(shutil.which("systemd-analyze"), "systemd-analyze (apt install systemd)")
    assert len(UNITS) == 2
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8").replace("/opt/vmferry/bin/", f"{tmp_path}/")
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
        (tmp_path / unit.stem).write_text("#!/bin/sh\n")
        (tmp_path / unit.stem).chmod(0o755)
    assert verified(tmp_path) == (0, "")
    broken = tmp_path / UNITS[0].name
    broken.write_text(broken.read_text("utf-8").replace("WatchdogSec=", "WatchdogTime="), encoding="utf-8")
    assert "WatchdogTime" in verified(tmp_path)[1]


def verified(folder: Path) -> tuple[int, str]:
    """What systemd says about the units of a folder."""
    units = sorted(str(path) for path in folder.glob("*.service"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout + done.stderr
