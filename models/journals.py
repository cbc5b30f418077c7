"""What a record changes in what a host's journals say, and what the loss of one changes back."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from models.state import ABSENT, Attempt, Host, In, Out, Phase, Stands

SOURCE, DESTINATION, UPDATE = range(3)
"""Who writes a journal; for the first two also where it stands in a pair of a host."""
NOT_UPDATING: Final[dict[str, Any]] = {"new": ABSENT, "new_held": 0, "updating": False}
"""What a crash leaves of an update beside its journal."""
Item = TypeVar("Item")

RECORDS: Final = frozenset(
    (
        *("BEGUN", "SEALED", "HANDED_OFF", "DONE", "ABORTED", "RECLAIMED", "FORCED", "SUPERSEDED"),
        *("ACCEPTED", "PREPARED", "OWNED", "RAN", "REFUSED"),
    )
)


def with_item(pair: tuple[Item, Item], index: int, value: Item) -> tuple[Item, Item]:
    """The pair with one of its items replaced."""
    return (value, pair[1]) if index == 0 else (pair[0], value)


def in_source_journal(host: Host, kind: str, number: int, attempt: Attempt) -> Host:
    """The host after a record of its source about this attempt."""
    out, rights = host.out, host.rights
    match kind:
        case "BEGUN":
            return host._replace(out=Out(Phase.BEGUN, number, attempt.number), fresh=True)
        case "SEALED":
            return host._replace(out=out._replace(phase=Phase.SEALED))
        case "HANDED_OFF":
            left = rights._replace(left=max(rights.left, attempt.epoch))
            return host._replace(out=out._replace(phase=Phase.HANDED_OFF), rights=left, fresh=False)
        case "RECLAIMED" | "FORCED":
            rights = rights._replace(by_source=max(rights.by_source, attempt.epoch + 2))
        case "SUPERSEDED":
            return host._replace(rights=rights._replace(left=max(rights.left, rights.granted)))
    closed = host.closed if kind == "DONE" else host.closed | 1 << number
    return host._replace(out=Out(used=out.used), rights=rights, fresh=False, closed=closed)


_STANDS_BY: Final = {
    "ACCEPTED": Stands.RECEIVING,
    "PREPARED": Stands.PREPARED,
    "OWNED": Stands.OWNED,
    "FORCED": Stands.OWNED,
    "RAN": Stands.RUNNING,
    "REFUSED": Stands.REFUSED,
    "SUPERSEDED": Stands.SUPERSEDED,
}


def in_destination_journal(host: Host, kind: str, number: int, attempt: Attempt) -> Host:
    """The host after a record of its destination about this attempt."""
    stands = [host.inn.of(at) for at in range(max(len(host.inn.stands), number + 1))]
    newest, rights = host.inn.newest, host.rights
    taking = kind == "ACCEPTED" or (host.taking and kind != "PREPARED" and number != newest)
    if kind == "ACCEPTED":
        if host.inn.now is Stands.OWNED:
            stands[newest] = Stands.RUNNING  # of an earlier right, which was used here and has moved on
        newest = number
    if kind in {"OWNED", "FORCED"}:
        rights = rights._replace(by_destination=max(rights.by_destination, attempt.epoch + 1))
    if kind == "SUPERSEDED":
        rights = rights._replace(left=max(rights.left, rights.granted))
    stands[number] = _STANDS_BY[kind]
    return host._replace(inn=In(tuple(stands), newest), rights=rights, taking=taking)


def killed(host: Host, role: int) -> Host:
    """The host without one of its services: what that process knew is gone."""
    return host._replace(fresh=False, updating=False) if role == SOURCE else host._replace(taking=False)


def settled(host: Host, role: int) -> Host:
    """The host with a journal that is read again after a crash that took nothing of it."""
    kept = None if host.lazy[role] else host.before[role]
    return host._replace(
        lazy=with_item(host.lazy, role, value=False), before=with_item(host.before, role, kept)
    )


def without_last(host: Host, role: int, *, torn: bool = False) -> Host:
    """The host with a journal whose last record is gone: a lazy one, or one that cannot be read any more."""
    kept = host.before[role]
    assert kept is not None
    host = host._replace(
        lazy=with_item(host.lazy, role, value=False),
        torn=with_item(host.torn, role, torn),
        before=with_item(host.before, role, None),
    )
    out, inn, rights = kept
    if role == SOURCE:
        rights = host.rights._replace(by_source=rights.by_source, left=rights.left)
        return host._replace(out=out, rights=rights)
    return host._replace(inn=inn, rights=host.rights._replace(by_destination=rights.by_destination))
