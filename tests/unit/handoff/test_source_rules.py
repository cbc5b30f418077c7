"""The source's rules beside its table: what proves that a hand-off was completed, and what an operator hears."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.handoff.samples import OTHER_MACHINE, A, B, C, attempt
from tests.unit.handoff.source_states import MINE, STATES, force
from vmferry.errors import WrongPhaseError
from vmferry.handoff.source import HandedOff, OwnerBegan, decide, proves_owner

BACK = attempt(1, epoch=2, source=B, destination=A)


def test_rule_4_only_the_same_machine_by_a_later_right_shows_that_it_ran_elsewhere() -> None:
    """Neither an attempt of the right that was handed over, nor one of another machine, settles a hand-off."""
    handed_off = STATES["handed-off"]
    assert isinstance(handed_off, HandedOff)
    assert proves_owner(handed_off, BACK)
    for other in (replace(BACK, epoch_from=MINE.epoch_from), replace(BACK, machine_id=OTHER_MACHINE)):
        assert not proves_owner(handed_off, other)
        assert decide(handed_off, OwnerBegan(other)) == []
    assert proves_owner(handed_off, replace(BACK, source=C, epoch_from=9))


@pytest.mark.parametrize(
    ("with_memory", "told"), [(True, "memory is gone here"), (False, "end its hypervisor first")]
)
def test_an_operator_hears_what_is_in_the_way(*, with_memory: bool, told: str) -> None:
    """The memory that is to be used is not there, or the one that is not to be used still is."""
    with pytest.raises(WrongPhaseError, match=told):
        decide(STATES["handed-off"], force(memory=not with_memory, with_memory=with_memory))
