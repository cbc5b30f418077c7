"""What a few hosts consist of in the simulation, and what must hold in every world.

The disk is a list of records of which the last may not be there yet, the guest is paused, running or absent and
holds a numbered state, and the network is the set of messages that may still arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, reduce
from typing import Final, Generic, NamedTuple, TypeVar

from vmferry.errors import VmferryError
from vmferry.handoff import destination, gate, records, source
from vmferry.handoff.rights import Epochs, Rights
from vmferry.handoff.states import Action, Attempt, AttemptState, Record

MACHINE: Final = "6f1c7f5e-3b0e-4c57-9d53-2f6a6a1d8a01"
ABSENT, PAUSED, RUNNING = range(3)
STALE, NO_COPY, BOTH, CRASHED = "stale", "taken without a copy", "although two hosts held it", "with its host"
"""How the guest's latest state was lost."""
Item = TypeVar("Item", bound=Hashable)


class _Interned(Generic[Item]):
    """Small numbers instead of large values, so that worlds are compared and hashed quickly."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._numbers: dict[Item, int] = {}

    def number(self, item: Item) -> int:
        """The number of a value."""
        if item not in self._numbers:
            self._numbers[item] = len(self.items)
            self.items.append(item)
        return self._numbers[item]


RECORDS: Final[_Interned[Record]] = _Interned()
ACTIONS: Final[_Interned[Action]] = _Interned()
ATTEMPTS: Final[_Interned[Attempt]] = _Interned()


class Host(NamedTuple):
    """One host: its journals, what of them is on disk, its guest, and what its services have begun to do."""

    vm: tuple[int, int] = (ABSENT, 0)
    operator: tuple[int, ...] = ()
    outgoing: tuple[int, ...] = ()
    incoming: tuple[int, ...] = ()
    unsynced: tuple[bool, bool] = (False, False)
    """Whether the last record of ``outgoing`` and of ``incoming`` may be in the page cache only."""
    todo: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """What the source and the destination service have decided and not done yet."""
    incarnation: int = 0
    off: bool = False
    """An operator has cut its power, and it stays off."""


class Message(NamedTuple):
    """Something under way about one attempt."""

    attempt: int
    kind: str
    state: int = 0
    digest: int = 0
    incarnation: int = 0


class World(NamedTuple):
    """Everything."""

    current: int = 0
    """Number of the latest executed state; grows whenever virtual CPUs start."""
    lost: str = ""
    faults: int = 0
    purges: int = 0
    hosts: tuple[Host, ...] = ()
    attempts: tuple[int, ...] = ()
    messages: frozenset[Message] = frozenset()


@cache
def through_codec(number: int) -> int:
    record = RECORDS.items[number]
    decoded, _ = records.decode(records.encode(record, boot_id="boot", write_unix_ns=0))
    return RECORDS.number(decoded)


@cache
def source_state(journal: tuple[int, ...]) -> source.SourceState:
    initial: source.SourceState = source.Quiet()
    return reduce(source.evolve, (RECORDS.items[number] for number in journal), initial)


@cache
def destination_state(journal: tuple[int, ...]) -> destination.DestinationState:
    return reduce(
        destination.evolve, (RECORDS.items[number] for number in journal), destination.DestinationState()
    )


@cache
def _rights(operator: tuple[int, ...], outgoing: tuple[int, ...], incoming: tuple[int, ...]) -> Rights:
    written = [RECORDS.items[number] for number in (*operator, *outgoing, *incoming)]
    epochs = reduce(Epochs.after, written, Epochs())
    return Rights(epochs, source_state(outgoing), destination_state(incoming))


def rights(host: Host) -> Rights:
    """What the host's journals say together."""
    return _rights(host.operator, host.outgoing, host.incoming)


def attempt_of(number: int) -> Attempt:
    """The attempt behind its number."""
    return ATTEMPTS.items[number]


def uri_of(host: int) -> str:
    return f"spiffe://example.org/vmhost/{'abc'[host]}"


def incarnation_of(host: int, number: int) -> str:
    return f"{'abc'[host]}-{number}"


def digest_of(state: int) -> bytes:
    return state.to_bytes(32, "big")


def host_of(uri: str) -> int:
    return "abc".index(uri[-1])


def leftover(host: Host) -> bool:
    """A guest that is not of an open incoming attempt: a service was killed before it had removed it."""
    arriving = destination_state(host.incoming).current
    return host.vm[0] != ABSENT and not isinstance(arriving, (destination.Receiving, destination.Prepared))


def moved_on(host: Host) -> bool:
    mine = rights(host)
    return mine.leaving or mine.epochs.left >= mine.epochs.granted


def resumed(world: World, number: int) -> World:
    host = world.hosts[number]
    try:
        gate.mint(MACHINE, rights(host))
    except VmferryError:
        return world
    if host.vm[0] != PAUSED:
        return world
    lost = STALE if host.vm[1] != world.current else ""
    started = host._replace(vm=(RUNNING, world.current + 1))
    return put(world, number, started)._replace(current=world.current + 1, lost=lost)


def replaced(pair: tuple[Item, Item], index: int, value: Item) -> tuple[Item, Item]:
    return (value, pair[1]) if index == 0 else (pair[0], value)


def put(world: World, number: int, host: Host) -> World:
    return world._replace(hosts=(*world.hosts[:number], host, *world.hosts[number + 1 :]))


def sent(world: World, message: Message) -> World:
    return world if message in world.messages else world._replace(messages=world.messages | {message})


# What must hold


def _open_attempt(host: Host) -> int | None:
    state = source_state(host.outgoing)
    if isinstance(state, source.Quiet) or not rights(host).leaving:
        return None
    return ATTEMPTS.number(state.attempt)


def _said_running(world: World, attempt: int) -> bool:
    running = AttemptState.RUNNING.value
    return any(m.attempt == attempt and m.kind == "answer" and m.state == running for m in world.messages)


def usable(world: World) -> set[int]:
    """Hosts with a complete copy of the latest state that the protocol may still run."""
    found = set()
    opened = {_open_attempt(host) for host in world.hosts}
    for number, host in enumerate(world.hosts):
        if host.vm[0] == ABSENT or host.vm[1] != world.current:
            continue
        outgoing = _open_attempt(host)
        arriving = destination_state(host.incoming).current
        deliverable = (
            isinstance(arriving, (destination.Prepared, destination.Owned))
            and ATTEMPTS.number(arriving.attempt) in opened
        )
        returnable = outgoing is not None and not _said_running(world, outgoing)
        if rights(host).permitted or returnable or deliverable:
            found.add(number)
    return found


def redundant(world: World) -> bool:
    """Both ends of an open attempt hold a complete copy, nobody has run since, nothing has failed yet."""
    if world.faults or any(host.vm[0] == RUNNING for host in world.hosts):
        return False
    for number in world.attempts:
        attempt = attempt_of(number)
        origin = world.hosts[host_of(attempt.source)]
        target = world.hosts[host_of(attempt.destination)]
        arriving = destination_state(target.incoming).current
        copies = origin.vm == target.vm == (PAUSED, world.current)
        if (
            copies
            and _open_attempt(origin) == number
            and isinstance(arriving, (destination.Prepared, destination.Owned))
            and arriving.attempt.matches(attempt)
            and not _said_running(world, number)
        ):
            return True
    return False


def violation(world: World, only: str = "") -> str:
    """Which promise is broken, if any; with ``only`` the others are not looked at."""
    for name, broken in _PROMISES.items():
        if name.startswith(only) and broken(world):
            return name
    return ""


_PROMISES: Final[dict[str, Callable[[World], bool]]] = {
    "I1: two guests run": lambda world: sum(host.vm[0] == RUNNING for host in world.hosts) > 1,
    "I1b: two hosts are permitted": lambda world: (
        sum(rights(host).permitted and not host.off for host in world.hosts) > 1
    ),
    "I2: a stale copy was resumed": lambda world: world.lost == STALE,
    "I2: the right was taken without a copy": lambda world: world.lost == NO_COPY,
    "I3: a step destroyed the last usable copy": lambda world: not world.lost and not usable(world),
    "I4: one crash lost what two hosts held": lambda world: world.lost == BOTH,
}


def runs(world: World) -> bool:
    """Whether the guest runs somewhere."""
    return any(host.vm[0] == RUNNING for host in world.hosts)
