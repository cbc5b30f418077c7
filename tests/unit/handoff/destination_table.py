"""The states of a destination, what can happen to it, and the table of what it does about each in each state."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Final

from tests.unit.handoff.samples import ADMIN, DIGEST, OTHER_DIGEST, C, attempt, record
from vmferry.errors import (
    InvalidArgumentError,
    MachineBusyError,
    MachineExistsError,
    StaleAttemptError,
    TicketUsedError,
    VmferryError,
    WrongPhaseError,
)
from vmferry.handoff.destination import (
    BeginAsked,
    CloseAsked,
    CopyLost,
    DestinationEvent,
    DestinationState,
    ForceAccept,
    GoAsked,
    GuestRan,
    Stalled,
    StatusAsked,
    Verified,
    evolve,
)
from vmferry.handoff.states import Action, Answer, Append, Attempt, Record, RecordKind

OLDER: Final = attempt(1)
MINE: Final = attempt(2)
NEWER: Final = attempt(3)
LATER_OWNER: Final = attempt(1, epoch=2, source=C)
OTHER_SOURCE: Final = attempt(3, source=C)
AGAIN: Final = attempt(1, epoch=2)


def folded(*written: Record) -> DestinationState:
    """The state after these records."""
    return reduce(evolve, written, DestinationState())


ACCEPTED: Final = record(RecordKind.ACCEPTED, MINE)
PREPARED: Final = record(RecordKind.PREPARED, MINE)
OWNED: Final = record(RecordKind.OWNED, MINE)
STATES: Final = {
    "empty": DestinationState(),
    "receiving": folded(ACCEPTED),
    "prepared": folded(ACCEPTED, PREPARED),
    "owned": folded(ACCEPTED, PREPARED, OWNED),
    "ran": folded(ACCEPTED, PREPARED, OWNED, record(RecordKind.RAN, MINE)),
    "refused": folded(ACCEPTED, record(RecordKind.REFUSED, MINE)),
    "superseded": folded(ACCEPTED, PREPARED, OWNED, record(RecordKind.SUPERSEDED, MINE)),
}


def begin(about: Attempt, *, holds: bool = False, nonce: bytes | None = None) -> BeginAsked:
    """A source wants to begin ``about``."""
    return BeginAsked(about, nonce or about.migration_id, 1, host_holds_machine=holds)


def force(*, operator: str = ADMIN, memory: bool = True, copy: bool = True) -> ForceAccept:
    """An operator wants the guest to run here."""
    return ForceAccept(operator, "power is off", copy_intact=copy, with_memory=memory)


def overrule(*, epoch: int = 2, leaving: bool = False) -> CloseAsked:
    """The source closed the attempt, and says that an operator gave it a later right."""
    return CloseAsked(MINE, "reason", superseded_by=3, epoch=epoch, leaving=leaving)


EVENTS: Final[dict[str, DestinationEvent]] = {
    "begin": begin(MINE),
    "begin, held": begin(MINE, holds=True),
    "begin older": begin(OLDER),
    "begin newer": begin(NEWER),
    "begin newer, held": begin(NEWER, holds=True),
    "begin newer, used ticket": begin(NEWER, nonce=MINE.migration_id),
    "begin, other source": begin(OTHER_SOURCE),
    "begin, later owner": begin(LATER_OWNER),
    "begin, later owner, stale copy": replace(begin(LATER_OWNER), stale_copy=True),
    "verified": Verified(MINE, DIGEST),
    "verified older": Verified(OLDER, DIGEST),
    "go": GoAsked(MINE, DIGEST, copy_intact=True),
    "go, other digest": GoAsked(MINE, OTHER_DIGEST, copy_intact=True),
    "go, no copy": GoAsked(MINE, DIGEST, copy_intact=False),
    "go older": GoAsked(OLDER, DIGEST, copy_intact=True),
    "go newer": GoAsked(NEWER, DIGEST, copy_intact=True),
    "ran": GuestRan(),
    "close": CloseAsked(MINE, "reason"),
    "close older": CloseAsked(OLDER, "reason"),
    "close newer": CloseAsked(NEWER, "reason"),
    "close, later owner": CloseAsked(LATER_OWNER, "reason"),
    "close, other source": CloseAsked(OTHER_SOURCE, "reason"),
    "close by a later right": overrule(),
    "close by a later right, sent on": overrule(leaving=True),
    "close by a later right, not ours": overrule(epoch=0),
    "close by an earlier right": overrule(epoch=4),
    "close older by a later right": replace(overrule(), attempt=OLDER),
    "copy lost": CopyLost("reason", tail_certain=True),
    "copy lost, torn end": CopyLost("reason", tail_certain=False),
    "stalled": Stalled(),
    "forced": force(),
    "forced, cold": force(memory=False),
    "forced, no copy": force(copy=False),
    "forced, cold, no copy": force(memory=False, copy=False),
    "forced, nobody": force(operator=""),
    "status": StatusAsked(MINE),
    "status older": StatusAsked(OLDER),
    "status newer": StatusAsked(NEWER),
}


def did(actions: list[Action]) -> str:
    """The actions in short: ``*`` is on disk before what follows, capitals in brackets are an answer."""
    return " ".join(_word(action) for action in actions)


def _word(action: Action) -> str:
    match action:
        case Append(record=written, durable=durable):
            return written.kind.name + ("*" if durable else "")
        case Answer(state=state):
            return f"({state.name})"
        case _:
            return type(action).__name__.lower()


REFUSE: Final = "REFUSED* release (REFUSED)"
TAKE: Final = "ACCEPTED* (RECEIVING)"
REPLACE: Final = f"REFUSED* release {TAKE}"
TOMBSTONE: Final = "REFUSED* (REFUSED)"
CLOSE_BOTH: Final = f"REFUSED* release {TOMBSTONE}"
IN_ALL: Final[dict[str, str | type[VmferryError]]] = {
    "begin older": StaleAttemptError,
    "begin, held": WrongPhaseError,
    "begin newer, held": MachineExistsError,
    "begin newer, used ticket": TicketUsedError,
    "verified older": WrongPhaseError,
    "go older": "(UNSEEN)",
    "go newer": "(UNSEEN)",
    "close older": "(REFUSED)",
    "close older by a later right": "(REFUSED)",
    "status older": "(REFUSED)",
    "ran": "",
    "copy lost": "",
    "copy lost, torn end": "",
    "stalled": "",
    "forced": WrongPhaseError,
    "forced, cold": WrongPhaseError,
    "forced, no copy": WrongPhaseError,
    "forced, cold, no copy": WrongPhaseError,
    "forced, nobody": InvalidArgumentError,
    "begin, later owner, stale copy": "ACCEPTED* release (RECEIVING)",
}
ROWS: Final[dict[str, dict[str, str | type[VmferryError]]]] = {
    "empty": {
        "close by a later right": TOMBSTONE,
        "close by a later right, sent on": TOMBSTONE,
        "close by a later right, not ours": TOMBSTONE,
        "close by an earlier right": TOMBSTONE,
        "close older by a later right": TOMBSTONE,
        "begin": TAKE,
        "begin, held": MachineExistsError,
        "begin older": TAKE,
        "begin newer": TAKE,
        "begin newer, used ticket": TAKE,
        "begin, other source": TAKE,
        "begin, later owner": TAKE,
        "verified": WrongPhaseError,
        "go": "(UNSEEN)",
        "go, other digest": "(UNSEEN)",
        "go, no copy": "(UNSEEN)",
        **{
            f"{what}{which}": TOMBSTONE
            for what in ("close", "status")
            for which in ("", " older", " newer", ", later owner", ", other source")
            if f"{what}{which}" in EVENTS
        },
    },
    "receiving": {
        "close by a later right": REFUSE,
        "close by a later right, sent on": REFUSE,
        "close by a later right, not ours": REFUSE,
        "close by an earlier right": REFUSE,
        "begin": "(RECEIVING)",
        "begin, held": "(RECEIVING)",
        "begin newer": REPLACE,
        "begin, other source": MachineBusyError,
        "begin, later owner": REPLACE,
        "verified": "PREPARED",
        "go": "(RECEIVING)",
        "go, other digest": "(RECEIVING)",
        "go, no copy": "(RECEIVING)",
        "close": REFUSE,
        "close newer": CLOSE_BOTH,
        "close, later owner": TOMBSTONE,
        "close, other source": TOMBSTONE,
        "copy lost": REFUSE,
        "copy lost, torn end": REFUSE,
        "stalled": REFUSE,
        "begin, later owner, stale copy": REPLACE,
        "status": "(RECEIVING)",
        "status newer": CLOSE_BOTH,
    },
    "prepared": {
        "close by a later right": REFUSE,
        "close by a later right, sent on": REFUSE,
        "close by a later right, not ours": REFUSE,
        "close by an earlier right": REFUSE,
        "begin": WrongPhaseError,
        "begin newer": REPLACE,
        "begin, other source": MachineBusyError,
        "begin, later owner": REPLACE,
        "verified": "(PREPARED)",
        "go": "OWNED* resume",
        "go, other digest": StaleAttemptError,
        "go, no copy": "wait (PREPARED)",
        "close": REFUSE,
        "close newer": CLOSE_BOTH,
        "close, later owner": TOMBSTONE,
        "close, other source": TOMBSTONE,
        "copy lost": REFUSE,
        "copy lost, torn end": "wait",
        "begin, later owner, stale copy": REPLACE,
        "forced": "FORCED* resume",
        "forced, cold": "release FORCED*",
        "forced, cold, no copy": "release FORCED*",
        "status": "(PREPARED)",
        "status newer": CLOSE_BOTH,
    },
    "owned": {
        "close by a later right": "SUPERSEDED* halt (SUPERSEDED)",
        "close by a later right, sent on": MachineBusyError,
        "close by a later right, not ours": "(OWNED)",
        "close by an earlier right": "(OWNED)",
        "begin": WrongPhaseError,
        "begin newer": StaleAttemptError,
        "begin newer, used ticket": StaleAttemptError,
        "begin, other source": StaleAttemptError,
        "begin, later owner": TAKE,
        "verified": "(OWNED)",
        "go": "resume",
        "go, other digest": "resume",
        "go, no copy": "(OWNED)",
        "ran": "RAN",
        "close": "(OWNED)",
        "close newer": "(REFUSED)",
        "close, later owner": TOMBSTONE,
        "close, other source": "(REFUSED)",
        "status": "(OWNED)",
        "status newer": "(REFUSED)",
    },
    "ran": {
        "close by a later right": "SUPERSEDED* halt (SUPERSEDED)",
        "close by a later right, sent on": MachineBusyError,
        "close by a later right, not ours": "(RUNNING)",
        "close by an earlier right": "(RUNNING)",
        "begin": WrongPhaseError,
        "begin newer": StaleAttemptError,
        "begin newer, used ticket": StaleAttemptError,
        "begin, other source": StaleAttemptError,
        "begin, later owner": TAKE,
        "verified": "(RUNNING)",
        "go": "(RUNNING)",
        "go, other digest": "(RUNNING)",
        "go, no copy": "(RUNNING)",
        "close": "(RUNNING)",
        "close newer": "(REFUSED)",
        "close, later owner": TOMBSTONE,
        "close, other source": "(REFUSED)",
        "status": "(RUNNING)",
        "status newer": "(REFUSED)",
    },
    "superseded": {
        **dict.fromkeys(
            (
                "close",
                "close by a later right",
                "close by a later right, sent on",
                "close by a later right, not ours",
                "close by an earlier right",
            ),
            "halt (SUPERSEDED)",
        ),
        "begin": WrongPhaseError,
        "begin newer": StaleAttemptError,
        "begin newer, used ticket": StaleAttemptError,
        "begin, other source": StaleAttemptError,
        "begin, later owner": TAKE,
        "verified": "(SUPERSEDED)",
        "go": "(SUPERSEDED)",
        "go, other digest": "(SUPERSEDED)",
        "go, no copy": "(SUPERSEDED)",
        "close newer": "(REFUSED)",
        "close, later owner": TOMBSTONE,
        "close, other source": "(REFUSED)",
        "status": "(SUPERSEDED)",
        "status newer": "(REFUSED)",
    },
    "refused": {
        "close by a later right": "(REFUSED)",
        "close by a later right, sent on": "(REFUSED)",
        "close by a later right, not ours": "(REFUSED)",
        "close by an earlier right": "(REFUSED)",
        "begin": WrongPhaseError,
        "begin newer": TAKE,
        "begin, other source": TAKE,
        "begin, later owner": TAKE,
        "verified": "(REFUSED)",
        "go": "(REFUSED)",
        "go, other digest": "(REFUSED)",
        "go, no copy": "(REFUSED)",
        "forced, cold": "release FORCED*",
        "forced, cold, no copy": "release FORCED*",
        "close": "(REFUSED)",
        "close newer": TOMBSTONE,
        "close, later owner": TOMBSTONE,
        "close, other source": TOMBSTONE,
        "status": "(REFUSED)",
        "status newer": TOMBSTONE,
    },
}
TABLE: Final = {
    (state, event): did_it for state in STATES for event, did_it in {**IN_ALL, **ROWS[state]}.items()
}
