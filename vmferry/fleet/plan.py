"""The plan of a fleet's update: which hosts there are, what belongs together, and what is done to each.

Promise: pure; a plan that exists makes sense: every key is known and typed, every host that is named exists, and no
availability set lies in one update domain alone, for its update would take the whole set down.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final, TypeVar, get_type_hints

from vmferry.client.places import Target, check_address, host_identity
from vmferry.errors import ConfigError, InvalidArgumentError

COMMAND: Final = "command"
GRPC: Final = "grpc"
HTTP: Final = "http"
KINDS: Final = (COMMAND, GRPC, HTTP)
_MAX_PARALLEL: Final = 64
_LEAST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 3600.0
Table = TypeVar("Table")


@dataclass(frozen=True)
class HostPlan:
    """One of ``[[hosts]]``."""

    name: str
    host: str
    """SPIFFE identity that its services' certificates carry."""
    source: str
    """``HOST:PORT`` of its source service."""
    destination: str
    """``HOST:PORT`` of its destination service, as other hosts reach it."""
    update_domain: int
    fault_domain: int = 0

    @property
    def target(self) -> Target:
        """Where machines go that go there."""
        return Target(self.host, self.destination)


@dataclass(frozen=True)
class SetPlan:
    """One of ``[[availability_sets]]``."""

    name: str
    hosts: tuple[str, ...]
    """The hosts that carry its machines."""


@dataclass(frozen=True)
class Check:
    """One of ``[[health]]``: what must hold for a host before the next one begins. ``{name}`` stands for the host."""

    kind: str
    """``grpc``: its source service says SERVING; ``http``: a URL answers 200; ``command``: it exits with 0."""
    url: str = ""
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class UpdatePlan:
    """The table ``[update]``: what is done to each host."""

    command: tuple[str, ...] = ()
    """Replaces the host's software, with the machines that must not stay away; ``{name}`` stands for the host."""
    in_place: bool | None = None
    """Whether machines may stay while the command runs, and be updated in place; by default if there is none."""
    qemu_binary: str = ""
    """What QEMU machines are to run in that stay; by default the path that they have, with what is there then."""
    max_pause_s: float = 30.0
    """How long an update in place may pause a guest."""
    parallel: int = 1
    """How many hosts of one update domain are updated at a time."""
    command_timeout_s: float = 1800.0
    health_timeout_s: float = 120.0
    """How long a host may take to become healthy."""
    notice_s: float = 0.0
    """How long guests are told before they are moved, or updated in place; 0: as their hosts are configured."""
    patience_s: float = 60.0
    """How long nothing may be able to move while a host is emptied, or a machine may be busy with something else."""


@dataclass(frozen=True)
class Plan:
    """The whole plan."""

    hosts: tuple[HostPlan, ...]
    sets: tuple[SetPlan, ...] = ()
    health: tuple[Check, ...] = ()
    update: UpdatePlan = UpdatePlan()
    digest: str = ""
    """Of the text; a journal goes with one plan and no other."""

    @property
    def in_place(self) -> bool:
        """Whether machines may stay. Only who wrote the command knows that it does not end them, as a reboot does."""
        said = self.update.in_place
        return not self.update.command if said is None else said

    def host(self, name: str) -> HostPlan:
        """A host by name."""
        return next(host for host in self.hosts if host.name == name)

    def sets_of(self, name: str) -> frozenset[str]:
        """The availability sets of which a host carries machines."""
        return frozenset(one.name for one in self.sets if name in one.hosts)

    @property
    def order(self) -> list[list[HostPlan]]:
        """The hosts by update domain, in the order in which they are updated."""
        numbers = sorted({host.update_domain for host in self.hosts})
        return [
            sorted(
                (host for host in self.hosts if host.update_domain == number),
                key=lambda host: (host.fault_domain, host.name),
            )
            for number in numbers
        ]

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            ConfigError: it is not TOML, or something in it makes no sense; ``field`` is its name.
        """
        try:
            said = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"the plan is not valid TOML: {error}", field="plan") from error
        known = ("hosts", "availability_sets", "health", "update")
        for key in said:
            if key not in known:
                raise ConfigError(f"unknown table {key!r}; known are {', '.join(known)}", field=key)
        plan = cls(
            _tables(HostPlan, said, "hosts"),
            _tables(SetPlan, said, "availability_sets"),
            _tables(Check, said, "health"),
            _table(UpdatePlan, said.get("update", {}), "update"),
            hashlib.sha256(text.encode()).hexdigest(),
        )
        plan.validate()
        return plan

    def validate(self) -> None:
        """Check what single tables cannot know.

        Raises:
            ConfigError: naming the field at fault.
        """
        if not self.hosts:
            raise ConfigError("there are no hosts", field="hosts")
        _check_unique([host.name for host in self.hosts], "hosts.name")
        _check_unique([host.host for host in self.hosts], "hosts.host")
        _check_unique([one.name for one in self.sets], "availability_sets.name")
        for host in self.hosts:
            try:
                host_identity(host.host, field="hosts.host")
                for key in ("source", "destination"):
                    check_address(getattr(host, key), field=f"hosts.{key}")
            except InvalidArgumentError as error:
                raise ConfigError(f"{host.name}: {error.message}", field=error.field) from error
        for one in self.sets:
            self._check_set(one)
        for check in self.health:
            _check_check(check)
        if not 1 <= self.update.parallel <= _MAX_PARALLEL:
            raise ConfigError(f"parallel must be between 1 and {_MAX_PARALLEL}", field="update.parallel")
        self._check_times()

    def _check_times(self) -> None:
        for key in ("command_timeout_s", "health_timeout_s"):
            if getattr(self.update, key) <= 0:
                raise ConfigError(f"{key} must be greater than 0", field=f"update.{key}")
        for key in ("notice_s", "patience_s"):
            if getattr(self.update, key) < 0:
                raise ConfigError(f"{key} must not be negative", field=f"update.{key}")
        if not _LEAST_PAUSE_S <= self.update.max_pause_s <= _LONGEST_PAUSE_S:
            raise ConfigError("max_pause_s must be from 0.05 to 3600", field="update.max_pause_s")
        if self.update.qemu_binary and not self.in_place:
            raise ConfigError(
                "qemu_binary is for machines that stay, and in_place = true is not said",
                field="update.qemu_binary",
            )

    def _check_set(self, one: SetPlan) -> None:
        names = {host.name for host in self.hosts}
        strangers = [name for name in one.hosts if name not in names]
        if strangers:
            raise ConfigError(
                f"{one.name} names {strangers[0]}, which is no host of the plan",
                field="availability_sets.hosts",
            )
        domains = {self.host(name).update_domain for name in one.hosts}
        if len(domains) < 2:  # noqa: PLR2004 - one could not stay up while another is updated
            raise ConfigError(
                f"all hosts of {one.name} are in one update domain, which would take it down as a whole",
                field="availability_sets.hosts",
                remedy="Put its hosts into at least two update domains.",
            )


def _check_unique(names: Sequence[str], field: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{twice[0]!r} is there more than once", field=field)


def _check_check(check: Check) -> None:
    if check.kind not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(KINDS)}", field="health.kind")
    if (check.kind == HTTP) != bool(check.url):
        raise ConfigError("url goes with kind http, and with no other", field="health.url")
    if (check.kind == COMMAND) != bool(check.command):
        raise ConfigError("command goes with kind command, and with no other", field="health.command")


def _tables(cls: type[Table], said: Mapping[str, Any], key: str) -> tuple[Table, ...]:
    values = said.get(key, [])
    if not isinstance(values, list):
        raise ConfigError(f"{key} must be an array of tables: [[{key}]]", field=key)
    return tuple(_table(cls, value, key) for value in values)


def _table(cls: type[Table], said: object, key: str) -> Table:
    if not isinstance(said, Mapping):
        raise ConfigError(f"{key} must be a table", field=key)
    hints = get_type_hints(cls)
    for name in said:
        if name not in hints:
            raise ConfigError(f"unknown key {name!r}; known are {', '.join(hints)}", field=f"{key}.{name}")
    values: dict[str, Any] = {}
    for one in fields(cls):  # type: ignore[arg-type]  # all of them are dataclasses
        if one.name in said:
            values[one.name] = _value(said[one.name], hints[one.name], f"{key}.{one.name}")
        elif one.default is MISSING:
            raise ConfigError(f"{one.name} is missing", field=f"{key}.{one.name}")
    return cls(**values)


def _value(value: object, wanted: Any, field: str) -> object:
    if wanted is float and type(value) is int:
        return float(value)
    if wanted == bool | None:
        if type(value) is not bool:
            raise ConfigError("must be true or false", field=field)
        return value
    if wanted in (str, int, float):
        if type(value) is not wanted or value == "":
            raise ConfigError(f"must be a {wanted.__name__}, and not empty", field=field)
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError("must be an array of strings", field=field)
    return tuple(value)
