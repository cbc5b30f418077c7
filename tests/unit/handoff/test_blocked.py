"""Which machines are called blocked and why, and what may be chosen about them: over every state of both halves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.handoff.samples import ADMIN, DIGEST, attempt
from vmferry.errors import VmferryError
from vmferry.handoff import destination, source
from vmferry.handoff.blocked import FRESH_S, Facts, Guest, Reason, Side, Word, doubt
from vmferry.handoff.choices import choices, open_attempt
from vmferry.handoff.rights import Epochs, Rights
from vmferry.handoff.states import AttemptState

HANDBOOK = Path(__file__).parents[3] / "docs" / "handoff.md"
AWAY = attempt(1, epoch=1)
HERE = attempt(1, epoch=2)
QUIET = source.Quiet()
NOTHING = destination.DestinationState()
OUTGOING: dict[str, source.SourceState] = {
    "quiet": QUIET,
    "begun": source.Begun(AWAY),
    "sealed": source.Sealed(AWAY, DIGEST),
    "handed off": source.HandedOff(AWAY, DIGEST),
}
INCOMING: dict[str, destination.Current] = {
    "empty": destination.Empty(),
    "receiving": destination.Receiving(HERE),
    "prepared": destination.Prepared(HERE, DIGEST),
    "owned": destination.Owned(HERE, DIGEST),
    "ran": destination.Owned(HERE, DIGEST, ran=True),
    "refused": destination.Refused(HERE),
}
GONE = {Guest.ABSENT, Guest.WAITING, Guest.SILENT}
TORN = {
    name: frozenset(sides) for name, sides in {"": (), "source": (Side.SOURCE,), "both": tuple(Side)}.items()
}


def rights(outgoing: str = "quiet", incoming: str = "empty", *, damaged: bool = False) -> Rights:
    """What journals say that fold to these two states; an owner by birth if nothing else makes it one."""
    left = 1 if outgoing == "handed off" else 0
    granted = HERE.epoch_to if incoming in {"owned", "ran"} else 1
    if outgoing == "quiet" and incoming in {"receiving", "prepared", "refused"}:
        granted = 0
    state = replace(NOTHING, current=INCOMING[incoming])
    return Rights(Epochs(granted, left), OUTGOING[outgoing], state, damaged=damaged)


def facts(of: Rights, guest: Guest = Guest.PAUSED, **others: object) -> Facts:
    """What a host knows of a machine."""
    return replace(Facts("web-1", of, guest), **others)  # type: ignore[arg-type]


def everything() -> Iterator[Facts]:
    """Every state of both halves with every guest, torn or not, damaged or not, with and without a service."""
    for outgoing, incoming, guest, torn, damaged, served in itertools.product(
        OUTGOING, INCOMING, Guest, TORN.values(), (False, True), (False, True)
    ):
        yield facts(rights(outgoing, incoming, damaged=damaged), guest, torn=torn, served=served)
    for guest, damaged in itertools.product(Guest, (False, True)):
        yield facts(replace(SUPERSEDED, damaged=damaged), guest)


R = Reason
SUPERSEDED = Rights(Epochs(1, 1, superseded=1), QUIET, NOTHING)


@pytest.mark.parametrize(
    ("of", "guest", "others", "reason"),
    [
        (rights(), Guest.RUNNING, {}, None),
        (SUPERSEDED, Guest.PAUSED, {}, R.SUPERSEDED),
        (SUPERSEDED, Guest.ABSENT, {}, R.SUPERSEDED),
        (rights(), Guest.PAUSED, {}, R.NOT_RESUMED),
        (rights(), Guest.ABSENT, {}, None),
        (rights(), Guest.ENDED, {}, None),
        (rights("begun"), Guest.RUNNING, {}, None),
        (rights("begun"), Guest.ABSENT, {}, R.MEMORY_GONE),
        (rights("begun"), Guest.RUNNING, {"torn": TORN["source"]}, R.JOURNAL_TORN),
        (rights("sealed"), Guest.PAUSED, {}, None),
        (rights("sealed"), Guest.PAUSED, {"served": False}, R.SERVICE_NEEDED),
        (rights("sealed"), Guest.SILENT, {}, R.MEMORY_GONE),
        (rights("sealed"), Guest.PAUSED, {"torn": TORN["source"]}, R.JOURNAL_TORN),
        (rights("handed off"), Guest.PAUSED, {}, R.OUTCOME_UNKNOWN),
        (rights("handed off"), Guest.ABSENT, {}, R.OUTCOME_UNKNOWN),
        (rights("handed off"), Guest.PAUSED, {"word": Word(AttemptState.OWNED)}, R.PEER_NOT_RESUMED),
        (rights("handed off"), Guest.PAUSED, {"word": Word(AttemptState.UNSEEN)}, R.PEER_LOST_JOURNAL),
        (rights("handed off"), Guest.PAUSED, {"word": Word(lost_journal=True)}, R.PEER_LOST_JOURNAL),
        (rights("handed off", "receiving"), Guest.WAITING, {}, None),
        (rights("handed off", "prepared"), Guest.PAUSED, {}, R.AWAITS_SOURCE),
        (rights(incoming="receiving"), Guest.WAITING, {}, None),
        (rights(incoming="prepared"), Guest.PAUSED, {}, R.AWAITS_SOURCE),
        (rights(incoming="prepared"), Guest.ABSENT, {}, R.COPY_GONE),
        (rights(incoming="prepared"), Guest.ABSENT, {"torn": TORN["both"]}, R.JOURNAL_TORN),
        (rights(incoming="owned"), Guest.RUNNING, {}, None),
        (rights(incoming="owned"), Guest.PAUSED, {}, R.NOT_RESUMED),
        (rights(incoming="owned"), Guest.SILENT, {}, R.NOT_RESUMED),
        (rights(incoming="owned"), Guest.ABSENT, {}, R.LOST_WITH_PROCESS),
        (rights(incoming="owned"), Guest.ABSENT, {"forced": True}, None),
        (rights(incoming="ran"), Guest.RUNNING, {}, None),
        (rights(incoming="ran"), Guest.ABSENT, {}, None),
        (rights(incoming="refused"), Guest.ABSENT, {}, None),
        (rights(damaged=True), Guest.RUNNING, {}, R.JOURNAL_DAMAGED),
    ],
)
def test_what_is_blocked_and_why(
    of: Rights, guest: Guest, others: dict[str, object], reason: Reason | None
) -> None:
    """One row for each thing that an operator can meet."""
    found = doubt(facts(of, guest, **others))
    assert (found.reason if found else None) is reason
    if found is not None:
        assert "web-1" in found.remedy or reason is R.SERVICE_NEEDED


def test_every_state_has_an_answer_that_fits_the_rights() -> None:
    """A running owner is never blocked, what was handed off without a word always is, damage comes first."""
    seen = set()
    for known in everything():
        found = doubt(known)
        seen.add(found.reason if found else None)
        if known.rights.damaged:
            assert found is not None
            assert found.reason is R.JOURNAL_DAMAGED
            continue
        if known.rights.permitted and known.guest is Guest.RUNNING:
            assert found is None or found.reason is R.AWAITS_SOURCE
        if known.rights.leaving and isinstance(known.rights.outgoing, source.HandedOff):
            assert found is not None
            assert found.reason is R.OUTCOME_UNKNOWN
        if found is not None and found.reason.is_known:
            assert known.rights.permitted or known.rights.superseded
    assert seen == {None, *R} - {R.PEER_LOST_JOURNAL, R.PEER_NOT_RESUMED}  # these need the other host's word


def test_every_reason_stands_in_the_handbook() -> None:
    """docs/handoff.md explains each reason that a person can be shown."""
    text = HANDBOOK.read_text("utf-8")
    assert [reason for reason in R if f"`{reason}`" not in text] == []


def test_a_moment_of_doubt_is_no_blockage() -> None:
    """What is younger than a migration's ordinary course is not shown; a clock that was set back hides nothing."""
    found = doubt(facts(rights("handed off")))
    assert found is not None
    assert not found.lasts(100.0, 100.0 + FRESH_S / 2)
    assert found.lasts(100.0, 100.0 + FRESH_S)
    assert found.lasts(100.0, 99.0)
    assert found.lasts(None, 0.0)


def test_a_choice_is_possible_exactly_if_the_core_would_accept_it() -> None:
    """Forcing is offered where ``decide`` takes it, and nowhere else; of a damaged journal nothing is offered."""
    for known in everything():
        offered = {choice.name: choice for choice in choices(known, doubt(known), stoppable=True)}
        memory = known.guest in {Guest.RUNNING, Guest.PAUSED}
        if known.rights.damaged:
            impossible = {"cancel", "force-reclaim", "force-accept", "end"}
            assert not any(choice.possible for name, choice in offered.items() if name in impossible)
            continue
        if known.guest is not Guest.SILENT:  # who must be ended first: the core would be told a lie
            reclaim = source.ForceReclaim(
                ADMIN, "off", memory_intact=memory, with_memory=memory, moved_on=known.rights.moved_on
            )
            assert offered["force-reclaim"].possible == accepts(
                lambda event=reclaim, known=known: source.decide(known.rights.outgoing, event)
            )
            assert ("--with-memory" in offered["force-reclaim"].command) == memory
        if offered["force-accept"].possible:
            accept = destination.ForceAccept(ADMIN, "off", copy_intact=memory, with_memory=False)
            assert destination.decide(known.rights.incoming, accept)
            assert not known.rights.owner
        ours = known.rights.owner or known.rights.superseded
        assert offered["end"].possible == (ours and not known.rights.leaving)
        assert not offered["end"].possible or not known.rights.damaged


def test_what_may_be_the_only_copy_is_never_cancelled_away() -> None:
    """Cancelling is offered only while the right is here and the memory with it."""
    for known in everything():
        cancel = next(
            choice for choice in choices(known, doubt(known), stoppable=True) if choice.name == "cancel"
        )
        if cancel.possible:
            assert isinstance(known.rights.outgoing, (source.Begun, source.Sealed))
            assert known.guest in {Guest.RUNNING, Guest.PAUSED}
            assert Side.SOURCE not in known.torn
        else:
            assert cancel.why_not


def test_every_choice_says_what_to_type_and_what_it_risks() -> None:
    """All seven are always there, each with a command of ours; nothing is offered where nothing is open."""
    names = ("wait", "repair-network", "recover", "cancel", "force-reclaim", "force-accept", "end")
    for known in everything():
        found = choices(known, doubt(known), stoppable=True)
        assert tuple(choice.name for choice in found) == names
        assert all(choice.command.startswith("vmferry ") and choice.risk for choice in found)
        if open_attempt(known.rights) is None and doubt(known) is None:
            assert not any(
                choice.possible for choice in found if choice.name in {"wait", "repair-network", "recover"}
            )


def accepts(decide: object) -> bool:
    """Whether a decision is taken and not turned down."""
    assert callable(decide)
    try:
        decide()
    except VmferryError:
        return False
    return True
