"""What a QEMU binary of this host can do, found out by asking and trying it.

Promise: an accelerator is called usable only after it executed guest code here, on the CPU model in question with
all its features; a ``/dev/kvm`` that is there proves nothing. What was found is remembered until the file changes.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vmferry.errors import InvalidArgumentError, MachineFailedError
from vmferry.machines.command import SANDBOX
from vmferry.machines.qemu import cpuid
from vmferry.machines.qemu.spec import ACCELERATORS, AUTO, MACHINE_ALIASES, QemuSpec
from vmferry.machines.spec import MachineSpec
from vmferry.negotiation.facts import CpuidKey

_ANSWER_S: Final = 20.0
_MAX_WORDS: Final = 400
_BARE: Final = ("-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX)
# At the reset vector: mov al, 'K'; out 0xe9, al; hlt; jmp back to the hlt.
_FIRMWARE_BYTES: Final = 64 * 1024
_PROGRAM: Final = bytes.fromhex("b04b e6e9 f4 ebfd")
_SAYS: Final = b"K"
_RESET_VECTOR: Final = _FIRMWARE_BYTES - 16


@dataclass(frozen=True)
class Binary:
    """A QEMU that answered."""

    path: str
    version: tuple[int, int, int]
    machine_types: frozenset[str]
    aliases: Mapping[str, str]
    """What names without a version mean to this release."""

    @property
    def version_text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))


def probe_binary(path: str) -> Binary:
    """Ask a binary for its version and machine types; takes a tenth of a second the first time.

    Raises:
        MachineFailedError: it is missing, or is no QEMU that can be asked.
    """
    return _probe_binary(path, _stamp(path))


def accelerator_problem(path: str, accelerator: str, cpu: str) -> str:
    """Why an accelerator does not work here with a CPU model; empty if guest code ran."""
    return _accelerator_problem(path, accelerator, cpu, _stamp(path))


def guest_cpuid(part: QemuSpec, vcpus: int) -> Mapping[CpuidKey, int] | None:
    """What a guest of this description would see of its processor here; ``None`` if it could not be started or asked.

    Raises:
        MachineFailedError: the binary is missing.
    """
    return _guest_cpuid(part.binary, part.machine, part.accelerator, part.cpu, vcpus, _stamp(part.binary))


def resolve(spec: MachineSpec) -> MachineSpec:
    """A description that means the same on every host: aliases and ``auto`` become what they mean here and now.

    Raises:
        InvalidArgumentError: this host's QEMU has no such machine type, or the accelerator does not work.
        MachineFailedError: the binary cannot be asked.
    """
    if spec.qemu is None:
        return spec
    part = spec.qemu
    binary = probe_binary(part.binary)
    machine = binary.aliases.get(part.machine, part.machine)
    if machine not in binary.machine_types or machine in MACHINE_ALIASES:
        raise InvalidArgumentError(
            f"{part.binary} {binary.version_text} has no machine type {part.machine}",
            field="qemu.machine",
            remedy=f"{part.binary} -machine help lists what it has.",
        )
    return replace(spec, qemu=replace(part, machine=machine, accelerator=_accelerator(part)))


def _accelerator(part: QemuSpec) -> str:
    candidates = ACCELERATORS if part.accelerator == AUTO else (part.accelerator,)
    problems = []
    for accelerator in candidates:
        problem = accelerator_problem(part.binary, accelerator, part.cpu)
        if not problem:
            return accelerator
        problems.append(f"{accelerator}: {problem}")
    raise InvalidArgumentError(
        f"no accelerator works here with the CPU model {part.cpu}: {'; '.join(problems)}",
        field="qemu.accelerator",
        remedy="Choose another CPU model, or use tcg.",
    )


def _stamp(path: str) -> tuple[int, int, int]:
    """What changes when a binary is replaced."""
    try:
        found = Path(path).stat()
    except OSError as error:
        raise MachineFailedError(
            f"cannot use {path}: {error.strerror}",
            field="qemu.binary",
            remedy="Install QEMU for x86-64 (on Debian: apt install qemu-system-x86).",
        ) from error
    return found.st_ino, found.st_mtime_ns, found.st_size


@functools.cache
def _probe_binary(path: str, _stamp: tuple[int, int, int]) -> Binary:
    version, machines = _ask(path, [{"execute": "query-version"}, {"execute": "query-machines"}])
    number = version["qemu"]
    return Binary(
        path=path,
        version=(int(number["major"]), int(number["minor"]), int(number["micro"])),
        machine_types=frozenset(str(machine["name"]) for machine in machines),
        aliases={str(machine["alias"]): str(machine["name"]) for machine in machines if "alias" in machine},
    )


@functools.cache
def _guest_cpuid(
    path: str, machine: str, accelerator: str, cpu: str, vcpus: int, _stamp: tuple[int, int, int]
) -> Mapping[CpuidKey, int] | None:
    like = (
        *("-machine", f"{machine},usb=off,vmport=off", "-accel", accelerator, "-cpu", f"{cpu},enforce"),
        *("-smp", str(vcpus), "-m", "16M"),
    )
    try:
        (processors,) = _ask(path, [{"execute": "query-cpus-fast"}], like)
        first = min(processors, key=lambda one: int(one["cpu-index"]))
        question = {"path": first["qom-path"], "property": cpuid.PROPERTY}
        (answer,) = _ask(path, [{"execute": "qom-get", "arguments": question}], like)
        return cpuid.words(answer)
    except (MachineFailedError, KeyError, TypeError, ValueError):
        return None  # why it cannot be started is a finding of its own


def _ask(
    path: str, questions: Sequence[Mapping[str, Any]], machine: Sequence[str] = ("-machine", "none")
) -> list[Any]:
    """The answers of a QEMU that runs nothing."""
    commands = [{"execute": "qmp_capabilities"}, *questions, {"execute": "quit"}]
    command = [path, *_BARE, *machine, "-S", "-qmp", "stdio"]
    try:
        done = subprocess.run(  # noqa: S603 - a binary that the configuration allows, without a shell
            command,
            input="".join(map(json.dumps, commands)),
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=True,
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        found = [answer["return"] for answer in answers if "return" in answer]
        return found[1 : 1 + len(questions)]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        told = getattr(error, "stderr", "") or str(error)
        raise MachineFailedError(
            f"{path} cannot be asked what it can do: {str(told)[:_MAX_WORDS]}"
        ) from error


@functools.cache
def _accelerator_problem(path: str, accelerator: str, cpu: str, _stamp: tuple[int, int, int]) -> str:
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is missing or closed to this user"
    with tempfile.NamedTemporaryFile(prefix="vmferry-probe-") as firmware:
        firmware.write(_PROGRAM.rjust(_RESET_VECTOR + len(_PROGRAM), b"\0").ljust(_FIRMWARE_BYTES, b"\0"))
        firmware.flush()
        command = [
            *(path, *_BARE, "-machine", "q35", "-accel", accelerator, "-cpu", f"{cpu},enforce", "-m", "16M"),
            *("-bios", firmware.name, "-debugcon", "stdio"),
        ]
        with subprocess.Popen(  # noqa: S603 - a binary that the configuration allows, without a shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            ready, _, _ = select.select([process.stdout], [], [], _ANSWER_S)
            said = os.read(process.stdout.fileno(), 1) if ready else b""
            process.kill()
            complaint = process.stderr.read().decode(errors="replace").strip()
    if said == _SAYS:
        return ""
    return complaint.replace("\n", "; ")[:_MAX_WORDS] or "it executed no guest code"
