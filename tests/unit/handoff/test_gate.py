"""The resume gate: a permit exists only behind journals that allow it, and cannot be had in another way."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from functools import reduce
from typing import Any, Final

import pytest

from tests.unit.handoff.samples import MACHINE, OTHER_MACHINE, attempt, record
from vmferry.errors import JournalDamagedError, MachineNotOwnedError
from vmferry.handoff import destination, source
from vmferry.handoff.gate import ResumePermit, mint, mint_held_back
from vmferry.handoff.rights import Epochs, Rights, Standing
from vmferry.handoff.states import Record, RecordKind

BORN: Final = Record(RecordKind.BORN, MACHINE, epoch=1)
ENDED: Final = Record(RecordKind.ENDED, MACHINE, epoch=1)
AWAY: Final = attempt(1, epoch=1)
BACK: Final = attempt(1, epoch=2)


def rights(*written: Record, damaged: bool = False) -> Rights:
    """What these records say, each in the journal of its role."""
    outgoing: source.SourceState = source.Quiet()
    incoming = destination.DestinationState()
    for entry in written:
        from_source = range(RecordKind.BEGUN.value, RecordKind.ACCEPTED.value)
        if entry.kind.value in from_source or entry == SUPERSEDED_HERE:
            outgoing = source.evolve(outgoing, entry)
        elif entry.kind.value >= RecordKind.ACCEPTED.value:
            incoming = destination.evolve(incoming, entry)
    return Rights(reduce(Epochs.after, written, Epochs()), outgoing, incoming, damaged=damaged)


def of(about: Any, *kinds: RecordKind) -> list[Record]:
    return [record(kind, about) for kind in kinds]


K: Final = RecordKind
BEGUN: Final = of(AWAY, K.BEGUN)
SEALED: Final = of(AWAY, K.BEGUN, K.SEALED)
HANDED_OFF: Final = of(AWAY, K.BEGUN, K.SEALED, K.HANDED_OFF)
ARRIVED: Final = of(BACK, K.ACCEPTED, K.PREPARED, K.OWNED)
SUPERSEDED: Final = dataclasses.replace(of(BACK, K.SUPERSEDED)[0], epoch=3)
SUPERSEDED_HERE: Final = dataclasses.replace(of(AWAY, K.SUPERSEDED)[0], epoch=1)
CASES: Final[dict[str, tuple[list[Record], Standing, int | None]]] = {
    "nothing": ([], Standing.NEVER_SEEN, None),
    "born": ([BORN], Standing.OWNED, 1),
    "ended": ([BORN, ENDED], Standing.GONE, None),
    "begun": ([BORN, *BEGUN], Standing.LEAVING, None),
    "sealed": ([BORN, *SEALED], Standing.LEAVING, None),
    "aborted": ([BORN, *SEALED, *of(AWAY, K.ABORTED)], Standing.OWNED, 1),
    "handed off": ([BORN, *HANDED_OFF], Standing.HANDED_OFF, None),
    "reclaimed": ([BORN, *HANDED_OFF, *of(AWAY, K.RECLAIMED)], Standing.OWNED, 3),
    "done": ([BORN, *HANDED_OFF, *of(AWAY, K.DONE)], Standing.GONE, None),
    "accepted": (of(BACK, K.ACCEPTED), Standing.ARRIVING, None),
    "prepared": (of(BACK, K.ACCEPTED, K.PREPARED), Standing.ARRIVING, None),
    "refused": (of(BACK, K.ACCEPTED, K.REFUSED), Standing.NEVER_SEEN, None),
    "owned": (ARRIVED, Standing.OWNED, 3),
    "went and came back": ([BORN, *HANDED_OFF, *of(AWAY, K.DONE), *ARRIVED], Standing.OWNED, 3),
    "came back, ended": (
        [BORN, *HANDED_OFF, *of(AWAY, K.DONE), *ARRIVED, dataclasses.replace(ENDED, epoch=3)],
        Standing.GONE,
        None,
    ),
    "superseded there": ([*ARRIVED, SUPERSEDED], Standing.SUPERSEDED, None),
    "superseded here": ([BORN, *SEALED, *of(AWAY, K.ABORTED), SUPERSEDED_HERE], Standing.SUPERSEDED, None),
    "superseded, and what was left ended": (
        [*ARRIVED, SUPERSEDED, dataclasses.replace(ENDED, epoch=3)],
        Standing.GONE,
        None,
    ),
    "coming back": ([BORN, *HANDED_OFF, *of(AWAY, K.DONE), *of(BACK, K.ACCEPTED)], Standing.ARRIVING, None),
}


def test_every_standing_is_among_the_cases() -> None:
    """A standing that no case reaches would be untested; damage has a test of its own."""
    assert {standing for _, standing, _ in CASES.values()} | {Standing.UNKNOWN} == set(Standing)


@pytest.mark.parametrize("name", CASES)
def test_a_permit_is_minted_only_for_an_owner_with_nothing_open(name: str) -> None:
    """Each course of records gives its standing, and a permit of the right epoch or none."""
    written, standing, epoch = CASES[name]
    now = rights(*written)
    assert now.standing is standing
    assert now.permitted == (epoch is not None)
    if epoch is None:
        with pytest.raises(MachineNotOwnedError, match=standing.name):
            mint(MACHINE, now)
    else:
        permit = mint(MACHINE, now)
        assert (permit.machine_id, permit.epoch) == (MACHINE, epoch)


@pytest.mark.parametrize("name", CASES)
def test_a_guest_that_is_held_back_goes_on_only_while_it_is_copied(name: str) -> None:
    """Of all courses of records only an attempt of which nothing is sealed gives that permit; damage never does."""
    written = CASES[name][0]
    if name == "begun":
        permit = mint_held_back(MACHINE, rights(*written))
        assert (permit.machine_id, permit.epoch) == (MACHINE, 1)
    else:
        with pytest.raises(MachineNotOwnedError):
            mint_held_back(MACHINE, rights(*written))
    with pytest.raises(MachineNotOwnedError):
        mint_held_back(MACHINE, rights(*written, damaged=True))


@pytest.mark.parametrize("name", CASES)
def test_damage_permits_nothing_and_holds_everything(name: str) -> None:
    """With a damaged journal there is no permit, and the machine is not taken in from elsewhere either."""
    now = rights(*CASES[name][0], damaged=True)
    assert now.standing is Standing.UNKNOWN
    assert now.holds
    assert not now.unheard_of
    with pytest.raises(JournalDamagedError):
        mint(MACHINE, now)


@pytest.mark.parametrize("name", CASES)
def test_a_host_holds_what_it_owns_or_has_not_let_go(name: str) -> None:
    """A machine is taken in only where it is neither owned nor on its way out."""
    written, standing, _ = CASES[name]
    assert rights(*written).holds == (standing in {Standing.OWNED, Standing.LEAVING, Standing.HANDED_OFF})
    assert rights(*written).unheard_of == (not written)


PERMIT: Final = mint(MACHINE, rights(BORN))
FORGERIES: Final[dict[str, Callable[[], object]]] = {
    "constructed": lambda: ResumePermit(MACHINE, 1),
    "with a seal of its own": lambda: ResumePermit(MACHINE, 1, object()),
    "for another machine": lambda: dataclasses.replace(PERMIT, machine_id=OTHER_MACHINE),
    "for another epoch": lambda: dataclasses.replace(PERMIT, epoch=2),
    "copied": lambda: copy.copy(PERMIT),
    "copied deeply": lambda: copy.deepcopy(PERMIT),
    "stored": lambda: pickle.dumps(PERMIT),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_permit_cannot_be_made_or_kept(forgery: str) -> None:
    """Neither constructing nor changing, copying or storing one gives a permit."""
    with pytest.raises(TypeError):
        FORGERIES[forgery]()


def test_a_permit_cannot_be_changed() -> None:
    """Its machine stays the one it was minted for."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        PERMIT.machine_id = OTHER_MACHINE  # type: ignore[misc]


def test_a_handover_of_nothing_gives_nothing_up() -> None:
    """Such a record is damage, which is found where records are folded; it must not hide that."""
    assert Epochs().after(Record(K.HANDED_OFF, MACHINE)) == Epochs()


def test_a_machine_that_is_leaving_was_heard_of() -> None:
    """Whatever else the journals say of it, it cannot be born again."""
    outgoing = source.Begun(AWAY)
    assert not Rights(Epochs(), outgoing, destination.DestinationState()).unheard_of
    assert Rights(Epochs(), source.Quiet(), destination.DestinationState()).unheard_of
