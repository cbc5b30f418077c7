"""What a micro-VM is made of, beyond what every machine has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

from vmferry.machines.fields import ADDED_IN_3, check_pattern, check_types, invalid

MAX_PARAM_CHARS: Final = 256
MAX_PORT: Final = 65_535
UNICAST_MAC: Final = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
MAC_FORM: Final = "a unicast address such as 52:54:00:12:34:56, in lower case"

_PROGRAM = re.compile(r"[a-z][a-z0-9-]{0,31}")
_PARAM = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_UNIX_NETDEV = re.compile(r"dgram:unix:/[^\s,]+")
_INET_NETDEV = re.compile(r"dgram:([A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")


@dataclass(frozen=True, kw_only=True)
class MicrovmSpec:
    """The ``[microvm]`` table; invalid values raise InvalidArgumentError naming the field."""

    TABLE: ClassVar[str] = "microvm."

    program: str
    """The guest program it runs."""
    params: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Parameters of the program."""
    mac: str
    netdev: str = ""
    """Where the network card's frames go: ``dgram:unix:PATH``, ``dgram:HOST:PORT``, or empty for nowhere."""
    self_track: bool = True
    """Whether the machine registers its own memory for write tracking, as opposed to being attached to."""
    metadata: bool = field(default=False, metadata=ADDED_IN_3)
    """Whether it has the device that leads to the host's metadata service."""

    def __post_init__(self) -> None:
        check_types(self, self.TABLE)
        check_pattern(self.TABLE + "program", self.program, _PROGRAM, "1 to 32 of a-z, 0-9 and '-'")
        for key, value in self.params.items():
            _check_param(f"{self.TABLE}params.{key}", key, value)
        check_pattern(self.TABLE + "mac", self.mac, UNICAST_MAC, MAC_FORM)
        _check_netdev(self.TABLE + "netdev", self.netdev)
        object.__setattr__(self, "params", dict(sorted(self.params.items())))


def _check_param(name: str, key: object, value: object) -> None:
    if not isinstance(key, str) or not _PARAM.fullmatch(key):
        raise invalid(name, "the name has the wrong form", "use a-z, 0-9, '_' and '-', at most 63")
    if not isinstance(value, str):
        raise invalid(name, f"must be a string, not {type(value).__name__}", "put it in quotes")
    if len(value) > MAX_PARAM_CHARS or not value.isprintable():
        raise invalid(name, "too long or not printable", f"at most {MAX_PARAM_CHARS} printable characters")


def _check_netdev(name: str, value: str) -> None:
    if not value or (_UNIX_NETDEV.fullmatch(value) and value.isprintable()):
        return
    inet = _INET_NETDEV.fullmatch(value)
    if inet is None or not 1 <= int(inet[2]) <= MAX_PORT:
        forms = "it must be dgram:unix:/ABSOLUTE/PATH, dgram:HOST:PORT, or empty"
        raise invalid(name, f"{value!r} has the wrong form", forms)
