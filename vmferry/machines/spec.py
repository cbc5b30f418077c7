"""What a machine is made of: the typed description both hosts must agree on, and the command it becomes.

Promise: a :class:`MachineSpec` that exists is valid. Nothing in it is passed through to a hypervisor unread:
every key is known, typed and bounded, an unknown one is refused by name, and :func:`render_command` is the
only place where a description turns into a command line.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
import tomllib
import uuid as uuids
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

from vmferry.errors import InvalidArgumentError
from vmferry.machines.paths import MachinePaths

SPEC_VERSION: Final = 1
MAX_MEMORY_MIB: Final = 1_048_576
MAX_PARAM_CHARS: Final = 256
MAX_PORT: Final = 65_535

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PROGRAM = re.compile(r"[a-z][a-z0-9-]{0,31}")
_PARAM = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_UNICAST_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
_UNIX_NETDEV = re.compile(r"dgram:unix:/[^\s,]+")
_INET_NETDEV = re.compile(r"dgram:([A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")


@dataclass(frozen=True, kw_only=True)
class MachineSpec:
    """The description of one machine; invalid values raise InvalidArgumentError naming the field."""

    version: int = SPEC_VERSION
    name: str
    """What people call it: a DNS label, unique on a host."""
    uuid: str
    """The machine's identity everywhere, on every host, for its whole life."""
    kind: str = "microvm"
    memory_mib: int
    vcpus: int = 1
    program: str
    """The guest program the micro-VM runs."""
    params: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Parameters of the program."""
    mac: str
    netdev: str = ""
    """Where the network card's frames go: ``dgram:unix:PATH``, ``dgram:HOST:PORT``, or empty for nowhere."""
    self_track: bool = True
    """Whether the machine registers its own memory for write tracking, as opposed to being attached to."""

    def __post_init__(self) -> None:
        self.validate()
        object.__setattr__(self, "params", dict(sorted(self.params.items())))

    def validate(self) -> None:
        """Check every field.

        Raises:
            InvalidArgumentError: naming the first field at fault and what would be right.
        """
        for key, wanted in _TYPES.items():
            _check_type(key, getattr(self, key), wanted)
        _check_number("version", self.version, SPEC_VERSION, SPEC_VERSION)
        _check_pattern("name", self.name, _NAME, "1 to 63 of a-z, 0-9 and '-', beginning with a letter")
        _check_pattern("uuid", self.uuid, _UUID, "a UUID in lower-case hexadecimal")
        if self.kind != "microvm":
            raise _invalid("kind", f"{self.kind!r} is no kind of machine", 'use "microvm"')
        _check_number("memory_mib", self.memory_mib, 1, MAX_MEMORY_MIB)
        _check_number("vcpus", self.vcpus, 1, 1)
        _check_pattern("program", self.program, _PROGRAM, "1 to 32 of a-z, 0-9 and '-'")
        for key, value in self.params.items():
            _check_param(key, value)
        _check_pattern(
            "mac", self.mac, _UNICAST_MAC, "a unicast address such as 52:54:00:12:34:56, in lower case"
        )
        _check_netdev(self.netdev)

    @classmethod
    def from_toml(cls, text: str) -> MachineSpec:
        """Read a description.

        Raises:
            InvalidArgumentError: not TOML, or a key is unknown, missing, of the wrong type or out of range.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise _invalid("spec", f"not valid TOML: {error}", "correct the line it names") from error
        for key in values:
            if key not in _TYPES:
                raise _invalid(key, "unknown key", f"known keys are {', '.join(_TYPES)}")
        for key in _REQUIRED:
            if key not in values:
                raise _invalid(key, "missing", "every machine needs it")
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> MachineSpec:
        """Read a description from a file; errors are those of :meth:`from_toml`."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise _invalid("spec", f"cannot read {path}: {error.strerror}", "name a readable file") from error
        except UnicodeDecodeError as error:
            raise _invalid("spec", f"{path} is not UTF-8 text", "save it as UTF-8") from error
        return cls.from_toml(text)

    def to_toml(self) -> str:
        """The description as TOML that :meth:`from_toml` reads back to an equal one."""
        lines = [f"{key} = {_quote(getattr(self, key))}" for key in _TYPES if key != "params"]
        lines += ["", "[params]", *(f"{key} = {_quote(value)}" for key, value in self.params.items())]
        return "\n".join(lines) + "\n"

    def digest(self) -> bytes:
        """SHA-256 of the canonical form; equal on two hosts exactly if their descriptions are equal."""
        values = {key: getattr(self, key) for key in _TYPES}
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"vmferry machine spec\n" + canonical.encode()).digest()


_TYPES: Final[dict[str, Any]] = {
    item.name: get_type_hints(MachineSpec)[item.name] for item in fields(MachineSpec)
}
_REQUIRED: Final = ("name", "uuid", "memory_mib", "program", "mac")


def new_spec(
    name: str, memory_mib: int, program: str, params: Mapping[str, str] | None = None
) -> MachineSpec:
    """Describe a machine that has never been, with a fresh identity and a locally administered MAC."""
    tail = secrets.token_bytes(3)
    return MachineSpec(
        name=name,
        uuid=str(uuids.uuid4()),
        memory_mib=memory_mib,
        program=program,
        params=params or {},
        mac=":".join(f"{byte:02x}" for byte in b"\x52\x54\x00" + tail),
    )


def render_command(spec: MachineSpec, paths: MachinePaths, *, incoming: bool) -> list[str]:
    """The command line of a machine's process; it never runs the guest before it is told to.

    Args:
        spec: what to run.
        paths: where its files are.
        incoming: wait for device state from elsewhere.
    """
    command = [
        *(sys.executable, "-P", "-m", "vmferry.machines.microvm"),
        *("--name", spec.name, "--uuid", spec.uuid),
        *("--memory-mib", str(spec.memory_mib), "--ram-file", str(paths.ram)),
        *("--qmp", str(paths.qmp), "--serial-file", str(paths.serial)),
        *("--mac", spec.mac),
    ]
    if spec.netdev:
        command += ["--netdev", spec.netdev]
    command += ["--program", spec.program]
    for key, value in spec.params.items():
        command += ["--param", f"{key}={value}"]
    command += ["--self-track", "on" if spec.self_track else "off", "-S"]
    if incoming:
        command += ["--incoming", "defer"]
    return command


def _invalid(key: str, fault: str, remedy: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"machine spec: {key}: {fault}", field=key, remedy=f"Correct {key!r}: {remedy}."
    )


def _check_type(key: str, value: object, wanted: Any) -> None:
    if wanted in (int, str, bool):
        if type(value) is not wanted:
            fault = f"must be of type {wanted.__name__}, not {type(value).__name__}"
            raise _invalid(key, fault, f"give a value of type {wanted.__name__}")
    elif not isinstance(value, Mapping):
        raise _invalid(key, f"must be a table, not {type(value).__name__}", "give a table of strings")


def _check_number(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        span = str(low) if low == high else f"between {low} and {high}"
        raise _invalid(key, f"{value} is out of range", f"it must be {span}")


def _check_pattern(key: str, value: str, pattern: re.Pattern[str], form: str) -> None:
    if not pattern.fullmatch(value):
        raise _invalid(key, f"{value!r} has the wrong form", f"it must be {form}")


def _check_param(key: object, value: object) -> None:
    if not isinstance(key, str) or not _PARAM.fullmatch(key):
        raise _invalid(
            f"params.{key}", "the name has the wrong form", "use a-z, 0-9, '_' and '-', at most 63"
        )
    if not isinstance(value, str):
        raise _invalid(f"params.{key}", f"must be a string, not {type(value).__name__}", "put it in quotes")
    if len(value) > MAX_PARAM_CHARS or not value.isprintable():
        raise _invalid(
            f"params.{key}", "too long or not printable", f"at most {MAX_PARAM_CHARS} printable characters"
        )


def _check_netdev(value: str) -> None:
    if not value or (_UNIX_NETDEV.fullmatch(value) and value.isprintable()):
        return
    inet = _INET_NETDEV.fullmatch(value)
    if inet is None or not 1 <= int(inet[2]) <= MAX_PORT:
        forms = "it must be dgram:unix:/ABSOLUTE/PATH, dgram:HOST:PORT, or empty"
        raise _invalid("netdev", f"{value!r} has the wrong form", forms)


def _quote(value: object) -> str:
    # JSON spells numbers, booleans and printable strings as TOML does, unless it escapes to ASCII.
    return json.dumps(value, ensure_ascii=False)
