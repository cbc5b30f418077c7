"""The QMP commands of the micro-VM: names, arguments, answers.

Promise: a command does what it does in QEMU, or is refused with an error; unknown arguments are refused, never
ignored. ``stop`` answers when the guest has executed its last instruction, ``cont`` when it has begun to execute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmferry.errors import InvalidArgumentError, VmferryError, WrongPhaseError
from vmferry.machines.microvm.machine import Announcement, Machine, RunState
from vmferry.machines.microvm.migration import Migration, Status
from vmferry.machines.microvm.version import VERSION
from vmferry.machines.process import boot_id

_CAPABILITY: Final = "x-ignore-shared"

Arguments = Mapping[str, Any]
Answer = dict[str, Any] | list[Any]


class CommandError(Exception):
    """A command is refused: QMP's error class and words."""

    def __init__(self, description: str, error_class: str = "GenericError") -> None:
        super().__init__(description)
        self.description = description
        self.error_class = error_class


@dataclass(frozen=True)
class _Command:
    run: Callable[[Arguments], Answer | Awaitable[Answer]]
    required: Mapping[str, type]
    optional: Mapping[str, type]


class Commands:
    """The commands of one machine, one at a time whoever sends them."""

    def __init__(self, machine: Machine, on_quit: Callable[[], None]) -> None:
        self._machine = machine
        self._on_quit = on_quit
        self._lock = asyncio.Lock()
        self.migration = Migration(machine)
        self._table: dict[str, _Command] = {}
        self._fill_table()

    async def execute(self, name: str, arguments: Arguments) -> Answer:
        """Run a command.

        Raises:
            CommandError: it does not exist, has wrong arguments, or cannot be done now.
        """
        command = self._table.get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        _check_arguments(command, arguments)
        async with self._lock:
            try:
                answer = command.run(arguments)
                return await answer if isinstance(answer, Awaitable) else answer
            except VmferryError as error:
                raise CommandError(str(error)) from error

    def _fill_table(self) -> None:
        options = self._machine.options
        self._add("query-version", lambda _: dict(VERSION))
        self._add("query-name", lambda _: {"name": options.name})
        self._add("query-uuid", lambda _: {"UUID": options.uuid})
        self._add("query-commands", lambda _: [{"name": name} for name in sorted(self._table)])
        self._add("query-status", self._query_status)
        self._add("stop", self._stop)
        self._add("cont", self._cont)
        self._add("quit", self._quit)
        self._add("x-query-vcpu-times", self._query_vcpu_times)
        self._add("x-query-clock", lambda _: self._machine.clock())
        self._add("x-keep-clock", self._keep_clock, {"realtime-ns": int})
        self._add("migrate-set-capabilities", self._set_capabilities, {"capabilities": list})
        self._add("query-migrate-capabilities", self._query_capabilities)
        self._add("migrate", self._migrate, {"uri": str})
        self._add("migrate-incoming", self._migrate_incoming, {"uri": str})
        self._add("query-migrate", self._query_migrate)
        self._add("ringbuf-write", self._ringbuf_write, {"device": str, "data": str})
        self._add(
            "announce-self", self._announce, {}, dict.fromkeys(("initial", "max", "rounds", "step"), int)
        )

    def _add(
        self,
        name: str,
        run: Callable[[Arguments], Answer | Awaitable[Answer]],
        required: Mapping[str, type] | None = None,
        optional: Mapping[str, type] | None = None,
    ) -> None:
        self._table[name] = _Command(run, required or {}, optional or {})

    def _query_status(self, _: Arguments) -> Answer:
        state = self._machine.state
        return {"running": state is RunState.RUNNING, "singlestep": False, "status": str(state)}

    def _stop(self, _: Arguments) -> Answer:
        self._machine.stop()
        return {}

    def _cont(self, _: Arguments) -> Answer:
        if self.migration.leaving:
            raise WrongPhaseError("the machine cannot go on while its device state is being sent")
        self._machine.cont()
        return {}

    def _quit(self, _: Arguments) -> Answer:
        self._on_quit()
        return {}

    def _query_vcpu_times(self, _: Arguments) -> Answer:
        return {
            "boot-id": boot_id(),
            "last-stop-monotonic-ns": self._machine.times.last_stop_ns,
            "last-start-monotonic-ns": self._machine.times.last_start_ns,
        }

    def _keep_clock(self, arguments: Arguments) -> Answer:
        if arguments["realtime-ns"] < 0:
            raise InvalidArgumentError("a time of day is not negative")
        self._machine.keep_clock(arguments["realtime-ns"])
        return {}

    def _set_capabilities(self, arguments: Arguments) -> Answer:
        wanted = [_capability(entry) for entry in arguments["capabilities"]]
        for state in wanted:
            self.migration.ignore_shared = state
        return {}

    def _query_capabilities(self, _: Arguments) -> Answer:
        return [{"capability": _CAPABILITY, "state": self.migration.ignore_shared}]

    def _migrate(self, arguments: Arguments) -> Answer:
        self.migration.send(arguments["uri"])
        return {}

    async def _migrate_incoming(self, arguments: Arguments) -> Answer:
        await self.migration.receive(arguments["uri"])
        return {}

    def _query_migrate(self, _: Arguments) -> Answer:
        if self.migration.status is Status.NONE:
            return {}
        answer = {"status": str(self.migration.status)}
        if self.migration.status is Status.FAILED:
            answer["error-desc"] = self.migration.error
        return answer

    def _ringbuf_write(self, arguments: Arguments) -> Answer:
        if arguments["device"] != "serial0":
            raise InvalidArgumentError(f"there is no device {arguments['device']!r}, only 'serial0'")
        if not self._machine.serial.feed(arguments["data"].encode()):
            raise InvalidArgumentError(
                "the serial port's input is full: the guest has not read what was sent before"
            )
        return {}

    def _announce(self, arguments: Arguments) -> Answer:
        values = {name if name == "rounds" else f"{name}_ms": value for name, value in arguments.items()}
        self._machine.announce(Announcement(**values))
        return {}


def _check_arguments(command: _Command, arguments: Arguments) -> None:
    for name in command.required:
        if name not in arguments:
            raise CommandError(f"Parameter '{name}' is missing")
    known = {**command.required, **command.optional}
    for name, value in arguments.items():
        if name not in known:
            raise CommandError(f"Parameter '{name}' is unexpected")
        if type(value) is not known[name]:
            raise CommandError(f"Invalid parameter type for '{name}', expected: {known[name].__name__}")


def _capability(entry: object) -> bool:
    """The state in one entry of ``migrate-set-capabilities``."""
    match entry:
        case {"capability": str(name), "state": bool(state), **rest} if not rest:
            if name == _CAPABILITY:
                return state
            raise InvalidArgumentError(
                f"the only capability of this machine is {_CAPABILITY!r}, not {name!r}"
            )
    raise InvalidArgumentError("a capability is an object with a string 'capability' and a boolean 'state'")
