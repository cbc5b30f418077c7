"""Whether there is room on this host for a newcomer, and how it is made.

Promise: nobody is admitted for whom there is too little memory, besides what is promised to others and has to stay
free; memory that is kept ready counts as free, and is given up before a newcomer takes memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from dest_svc.arrival import Arrival
from dest_svc.offer import left_for_newcomers
from dest_svc.receiver import Receiver
from vmferry.config import HostConfig
from vmferry.errors import InsufficientMemoryError, MachineExistsError, TooManyMigrationsError
from vmferry.handoff.states import Attempt
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.host import MemoryBacking
from vmferry.machines.readymemory import ReadyMemory
from vmferry.machines.spec import MachineSpec
from vmferry.memory.backings import HUGETLBFS

_MIB: Final = 1024 * 1024


class Room:
    """The room of one host, in which its open attempts have their share."""

    def __init__(
        self,
        config: HostConfig,
        directory: MachineDirectory,
        arrivals: Mapping[str, Arrival],
        *,
        closed: Callable[[], bool],
    ) -> None:
        """Nothing is taken yet.

        Args:
            config: this host's.
            directory: its machines.
            arrivals: its open attempts.
            closed: whether it takes no newcomers; it may change at any time.
        """
        self._config = config
        self._directory = directory
        self._arrivals = arrivals
        self.ready = ReadyMemory(
            config.ram_dir,
            config.ready_memory_mib,
            headroom_bytes=config.memory_headroom_mib * _MIB,
            busy=lambda: bool(self._receivers()),
            closed=closed,
        )

    def backings(self) -> list[MemoryBacking]:
        """What guest memory can be here, and how much of each kind newcomers may have."""
        return left_for_newcomers(self._config, self._receivers(), self.ready.held_bytes)

    def check(self, attempt: Attempt, spec: MachineSpec) -> None:
        """Refuse a newcomer for whom there is no room.

        Raises:
            TooManyMigrationsError: as many arrive as may.
            MachineExistsError: another machine has its name.
            InsufficientMemoryError: there is too little memory of the kind that it has.
        """
        own = self._arrivals.get(attempt.machine_id)
        if own is not None and own.receiver is not None and own.receiver.attempt.matches(attempt):
            return  # a repeated Begin
        others = sum(1 for other in self._arrivals.values() if other.receiver and other is not own)
        if others >= self._config.max_incoming:
            raise TooManyMigrationsError(
                f"this host takes in {self._config.max_incoming} migrations at a time", limit="max_incoming"
            )
        if any(
            record.spec.name == spec.name and record.spec.uuid != spec.uuid
            for record in self._directory.list()
        ):
            raise MachineExistsError(
                f"a machine named {spec.name} is on this host already", field="spec.name"
            )
        backings = {backing.name: backing.available_bytes for backing in self.backings()}
        available = backings.get(spec.memory_backing, 0)
        if spec.memory_bytes > available:
            raise InsufficientMemoryError(
                f"{spec.name} needs {spec.memory_mib} MiB of {spec.memory_backing}, "
                f"this host has {available // _MIB} MiB to give",
                field="spec.memory_mib",
            )

    def make(self) -> None:
        """Give up memory that is kept ready, as far as those who have been admitted need it; they may be here."""
        promised = sum(
            receiver.outstanding_bytes
            for receiver in self._receivers()
            if receiver.spec.memory_backing != HUGETLBFS
        )
        self.ready.make_room(promised)

    def _receivers(self) -> list[Receiver]:
        return [arrival.receiver for arrival in tuple(self._arrivals.values()) if arrival.receiver]
