"""What a destination's journal says: how the newest attempt stands, and what became of the older ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vmferry.handoff.states import Answer, Attempt


@dataclass(frozen=True)
class Empty:
    """No attempt has been seen."""


@dataclass(frozen=True)
class Receiving:
    """Memory is being received."""

    attempt: Attempt


@dataclass(frozen=True)
class Prepared:
    """A complete, verified, loaded copy waits for Go."""

    attempt: Attempt
    digest: bytes


@dataclass(frozen=True)
class Owned:
    """This host took the right to run; ``ran`` once the guest has executed here."""

    attempt: Attempt
    digest: bytes
    ran: bool = False


@dataclass(frozen=True)
class Refused:
    """The newest attempt is closed for ever."""

    attempt: Attempt
    note: str = ""


@dataclass(frozen=True)
class Superseded:
    """This host took the right to run, and stopped when it heard of a later one."""

    attempt: Attempt


Current = Empty | Receiving | Prepared | Owned | Refused | Superseded


@dataclass(frozen=True)
class DestinationState:
    """The newest attempt, and what became of the older ones."""

    current: Current = Empty()
    past: Mapping[bytes, Answer] = field(default_factory=lambda: MappingProxyType({}))
    """Final answers by migration id, so that a late question is answered from the journal."""
    burnt: frozenset[bytes] = frozenset()
    """Ticket numbers that were used."""
