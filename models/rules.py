"""The rules: what each end does about each event, as words in the order in which they are done.

``RECORD*`` is on disk before the next word, ``RECORD`` need not be. ``resume`` asks the resume gate, ``release``
frees what is here, ``halt`` pauses the guest for good, ``Go``, ``Abort`` and ``ask`` are told to the destination,
``(ANSWER)`` is told to the source, ``wait`` tells the operator, and ``no`` turns a call down. A rule knows the
journal of its own end and what the event says; it knows no time and no other host.

Each guard has a name; a variant of the model that names it in ``without`` is the same protocol without that guard.
"""

from __future__ import annotations

from typing import Final, NamedTuple, assert_never

from models.state import NOBODY, OPEN_HERE, SPENT, Attempt, Host, In, Out, Phase, Stands


class Do(NamedTuple):
    """One thing to do, about one attempt."""

    word: str
    attempt: int = NOBODY


NO: Final = (Do("no"),)
WAIT: Final = Do("wait")


# What a source meets


class Begin(NamedTuple):
    """A migration shall start."""

    attempt: int


class Paused(NamedTuple):
    """The guest is paused, its state has a digest."""


class AbortWanted(NamedTuple):
    """A failure, somebody's cancellation, or a start of the service."""

    memory: bool
    certain: bool
    fresh: bool


class Heard(NamedTuple):
    """The destination said how the open attempt stands."""

    answer: Stands
    same_journal: bool
    memory: bool
    certain: bool


class Unheard(NamedTuple):
    """No answer."""


class OwnerBegan(NamedTuple):
    """An attempt that brings the machine here was accepted."""

    attempt: int


class WaitedEnough(NamedTuple):
    """The destination was silent for as long as a source without the memory waits."""

    memory: bool
    certain: bool


class ForceReclaim(NamedTuple):
    """An operator wants the guest back."""

    memory: bool
    with_memory: bool
    moved_on: bool


class TakenThere(NamedTuple):
    """The goodbye about an attempt that was closed here has the answer that its destination took the right."""

    attempt: int
    epoch: int
    """The right that this host has now; 0 if it has none, has an attempt open, or got it back by a later one."""


SourceEvent = (
    Begin | Paused | AbortWanted | Heard | Unheard | OwnerBegan | WaitedEnough | ForceReclaim | TakenThere
)


# What a destination meets


class BeginAsked(NamedTuple):
    """A source wants to begin."""

    attempt: int
    held: bool
    stale_copy: bool


class Verified(NamedTuple):
    """A complete copy is here."""

    attempt: int


class GoAsked(NamedTuple):
    """The source has given up the right to run."""

    attempt: int
    intact: bool


class GuestRan(NamedTuple):
    """The guest executes here, or has."""


class CloseAsked(NamedTuple):
    """The source closes the attempt."""

    attempt: int
    later: bool = False
    """It says that it has a right by now that is later than the one that this host still has."""
    leaving: bool = False
    """This host is sending the machine on."""


class CopyLost(NamedTuple):
    """The copy is gone."""

    certain: bool


class Stalled(NamedTuple):
    """Nothing comes any more."""


class StatusAsked(NamedTuple):
    """The source asks how an attempt stands."""

    attempt: int


class ForceAccept(NamedTuple):
    """An operator wants the guest to run here."""

    memory: bool
    intact: bool


DestinationEvent = (
    BeginAsked | Verified | GoAsked | GuestRan | CloseAsked | CopyLost | Stalled | StatusAsked | ForceAccept
)


class Rules:
    """The protocol, or the protocol without some of its guards."""

    def __init__(self, *without: str) -> None:
        self._without = frozenset(without)

    def lacks(self, guard: str) -> bool:
        """Whether this is a variant without that guard."""
        return guard in self._without

    def about(
        self, host: Host, event: SourceEvent | DestinationEvent, attempts: tuple[Attempt, ...]
    ) -> tuple[Do, ...]:
        """What the end that an event belongs to does about it."""
        if isinstance(event, SourceEvent):
            return self.source(host.out, event, attempts)
        return self.destination(host.inn, event, attempts)

    # The source

    def source(self, out: Out, event: SourceEvent, attempts: tuple[Attempt, ...]) -> tuple[Do, ...]:
        """What a source does."""
        words = self._source(out, event, attempts)
        about = event.attempt if isinstance(event, (Begin, TakenThere)) else out.attempt
        return tuple(Do(word, about if word not in {"wait", "no"} else NOBODY) for word in words)

    def _source(self, out: Out, event: SourceEvent, attempts: tuple[Attempt, ...]) -> tuple[str, ...]:
        match event:
            case Begin(attempt=attempt):
                free = out.phase is Phase.QUIET and attempts[attempt].number > out.used
                return ("BEGUN*",) if free else ("no",)
            case Paused():
                return ("SEALED",) if out.phase is Phase.BEGUN else ("no",)
            case AbortWanted():
                return self._abort(out, event)
            case Heard():
                return self._heard(out, event)
            case Unheard():
                if out.phase is not Phase.HANDED_OFF:
                    return ()
                return ("RECLAIMED*", "resume") if self.lacks("silence means nothing") else ("Go",)
            case OwnerBegan(attempt=attempt):
                handed_off = out.phase is Phase.HANDED_OFF
                later = handed_off and attempts[attempt].epoch > attempts[out.attempt].epoch
                return ("DONE*", "release") if later else ()
            case WaitedEnough():
                return self._waited(out, event)
            case ForceReclaim():
                settled = out.phase is Phase.QUIET or event.moved_on
                if settled or event.with_memory != event.memory:
                    return ("no",)
                return ("FORCED*", "resume", "Abort") if event.memory else ("FORCED*", "Abort")
            case TakenThere(epoch=epoch):
                stays = not epoch or out.phase is not Phase.QUIET or self.lacks("a source stops, too")
                return () if stays else ("SUPERSEDED*", "halt")
        assert_never(event)

    def _abort(self, out: Out, event: AbortWanted) -> tuple[str, ...]:
        if out.phase is Phase.QUIET:
            return ()
        if out.phase is Phase.HANDED_OFF:
            return ("wait",)
        never_sealed = out.phase is Phase.BEGUN and event.fresh
        if not event.memory and not never_sealed and not self.lacks("ask before closing without memory"):
            return ("wait", "Abort") if self.lacks("ask without closing") else ("wait", "ask")
        if not event.certain and not self.lacks("ask behind a torn end"):
            return ("wait", "Abort")
        aborted = "ABORTED" if self.lacks("ABORTED on disk") else "ABORTED*"
        return (aborted, "resume", "Abort") if event.memory else (aborted, "Abort")

    def _heard(self, out: Out, heard: Heard) -> tuple[str, ...]:
        if out.phase is Phase.QUIET:
            return ()
        same = heard.same_journal or self.lacks("only the journal that said ready")
        if out.phase is Phase.HANDED_OFF:
            return self._heard_after(heard) if same else ("wait",)
        match heard.answer:
            case Stands.PREPARED if same:
                return self._ready(out, heard)
            case Stands.REFUSED if same or heard.certain:
                return ("ABORTED*", "resume") if heard.memory else ("ABORTED*",)
            case Stands.OWNED | Stands.RUNNING if same and out.phase is Phase.SEALED:
                return ("HANDED_OFF*", *self._heard_after(heard))
        return () if heard.memory else ("wait",)

    def _ready(self, out: Out, heard: Heard) -> tuple[str, ...]:
        if not heard.certain and not self.lacks("no hand-off behind a torn end"):
            return ("Abort",) if heard.memory else ("wait",)
        handed_off = "HANDED_OFF" if self.lacks("HANDED_OFF on disk") else "HANDED_OFF*"
        go: tuple[str, ...] = ("Go", handed_off) if self.lacks("HANDED_OFF before Go") else (handed_off, "Go")
        if self.lacks("memory stays until it runs elsewhere"):
            go = (*go, "release")
        if out.phase is Phase.SEALED:
            return go
        if heard.memory or self.lacks("rescue of a lost seal"):
            return ()
        return ("SEALED", *go)

    def _heard_after(self, heard: Heard) -> tuple[str, ...]:
        match heard.answer:
            case Stands.RUNNING:
                return ("DONE*", "release")
            case Stands.REFUSED:
                return ("RECLAIMED*", "resume") if heard.memory else ("RECLAIMED*",)
            case Stands.PREPARED | Stands.RECEIVING:
                return ("Go",)
        return ("wait",)

    def _waited(self, out: Out, event: WaitedEnough) -> tuple[str, ...]:
        if out.phase is Phase.HANDED_OFF and self.lacks("no time limit after HANDED_OFF"):
            return ("RECLAIMED*", "Abort")
        if out.phase not in {Phase.BEGUN, Phase.SEALED} or event.memory:
            return ()
        if not event.certain and not self.lacks("no time limit behind a torn end"):
            return ("wait",)
        return ("ABORTED*", "Abort")

    # The destination

    def destination(  # noqa: PLR0912 - one case per event
        self, inn: In, event: DestinationEvent, attempts: tuple[Attempt, ...]
    ) -> tuple[Do, ...]:
        """What a destination does."""
        match event:
            case BeginAsked():
                return self._begin(inn, event, attempts)
            case Verified(attempt=attempt):
                if inn.newest == attempt and inn.now is Stands.RECEIVING:
                    return (Do("PREPARED", attempt),)
                unknown = inn.of(attempt) in {Stands.UNSEEN, Stands.RECEIVING}
                return NO if unknown else (_answer(inn, attempt),)
            case GoAsked():
                return self._go(inn, event)
            case GuestRan():
                return (Do("RAN", inn.newest),) if inn.now is Stands.OWNED else ()
            case CloseAsked(attempt=attempt):
                if inn.of(attempt) in OPEN_HERE:
                    return self._refuse(attempt)
                if attempt == inn.newest and inn.now in SPENT:
                    return self._overruled(inn, event)
                return self._asked(inn, attempt, attempts)
            case CopyLost(certain=certain):
                torn = not certain and not self.lacks("no refusal behind a torn end")
                if inn.now is Stands.PREPARED and torn:
                    return (WAIT,)
                return self._refuse(inn.newest) if inn.now in OPEN_HERE else ()
            case Stalled():
                return self._stalled(inn)
            case StatusAsked(attempt=attempt):
                return self._asked(inn, attempt, attempts)
            case ForceAccept(memory=memory, intact=intact):
                return self._force_accept(inn, memory=memory, intact=intact)
        assert_never(event)

    def _begin(self, inn: In, event: BeginAsked, attempts: tuple[Attempt, ...]) -> tuple[Do, ...]:
        attempt = event.attempt
        if attempt == inn.newest:
            return (_answer(inn, attempt),) if inn.now is Stands.RECEIVING else NO
        if event.held:
            return NO
        if not self._may_begin(inn, attempt, attempts):
            return NO
        accept = (Do("ACCEPTED*", attempt), Do("(RECEIVING)", attempt))
        if inn.now in OPEN_HERE:
            newer, older = attempts[attempt], attempts[inn.newest]
            if newer.source != older.source and newer.epoch <= older.epoch:
                return NO
            return (*self._refuse(inn.newest)[:-1], *accept)
        if event.stale_copy:
            return (accept[0], Do("release", attempt), accept[1])
        return accept

    def _go(self, inn: In, event: GoAsked) -> tuple[Do, ...]:
        attempt = event.attempt
        intact = event.intact or self.lacks("no right without a copy")
        if attempt == inn.newest and inn.now is Stands.PREPARED:
            if not intact:
                return (WAIT, _answer(inn, attempt))
            owned = "OWNED" if self.lacks("OWNED on disk") else "OWNED*"
            return (Do(owned, attempt), Do("resume", attempt))
        if attempt == inn.newest and inn.now is Stands.OWNED and intact:
            return (Do("resume", attempt),)
        return (_answer(inn, attempt),)

    def _force_accept(self, inn: In, *, memory: bool, intact: bool) -> tuple[Do, ...]:
        if inn.now is Stands.PREPARED and memory and intact:
            return (Do("FORCED*", inn.newest), Do("resume", inn.newest))
        if memory or inn.now not in {Stands.PREPARED, Stands.REFUSED}:
            return NO
        does = (Do("release", inn.newest), Do("FORCED*", inn.newest))
        return does[::-1] if self.lacks("nothing to resume before the right is forced") else does

    def _overruled(self, inn: In, event: CloseAsked) -> tuple[Do, ...]:
        if inn.now is Stands.SUPERSEDED:
            return (Do("halt", event.attempt), _answer(inn, event.attempt))
        if event.leaving and event.later and not self.lacks("first it is known where it goes"):
            return NO
        if not event.later or self.lacks("a later right stops an earlier one"):
            return (_answer(inn, event.attempt),)
        words = ("SUPERSEDED*", "halt", "(SUPERSEDED)")
        return tuple(Do(word, event.attempt) for word in words)

    def _stalled(self, inn: In) -> tuple[Do, ...]:
        if inn.now is Stands.PREPARED and self.lacks("silence takes nothing"):
            return (Do("OWNED*", inn.newest), Do("resume", inn.newest))
        dropped = inn.now is Stands.PREPARED and self.lacks("silence drops nothing")
        return self._refuse(inn.newest) if inn.now is Stands.RECEIVING or dropped else ()

    def _asked(self, inn: In, attempt: int, attempts: tuple[Attempt, ...]) -> tuple[Do, ...]:
        """An attempt that is not open here: answered, or closed before it was ever begun."""
        if inn.of(attempt) is not Stands.UNSEEN:
            return (_answer(inn, attempt),)
        refused = Do("(REFUSED)", attempt)
        if attempts[attempt].order <= self._highest(inn, attempts) or self.lacks("REFUSED on disk"):
            return (refused,)
        same_source = inn.now in OPEN_HERE and attempts[inn.newest].source == attempts[attempt].source
        older = self._refuse(inn.newest)[:-1] if same_source else ()
        return (*older, Do("REFUSED*", attempt), refused)

    def _refuse(self, attempt: int) -> tuple[Do, ...]:
        answer = Do("(REFUSED)", attempt)
        if self.lacks("REFUSED on disk"):
            return (answer,)
        return (Do("REFUSED*", attempt), Do("release", attempt), answer)

    def _may_begin(self, inn: In, attempt: int, attempts: tuple[Attempt, ...]) -> bool:
        newer = attempts[attempt].order > self._highest(inn, attempts)
        return newer and inn.of(attempt) is Stands.UNSEEN

    def _highest(self, inn: In, attempts: tuple[Attempt, ...]) -> tuple[int, int]:
        if inn.newest == NOBODY or self.lacks("order of attempts"):
            return (-1, -1)
        newest = attempts[inn.newest]
        # A right that was taken here is spent: no attempt can hand it over again.
        return (newest.epoch + 1, -1) if inn.now in SPENT else newest.order


def _answer(inn: In, attempt: int) -> Do:
    return Do(f"({inn.of(attempt).name})", attempt)
