"""The operator's word: what it must say, and what is made of one that was given before."""

from __future__ import annotations

from typing import Final

import pytest

from tests.unit.handoff.samples import ADMIN, MACHINE, attempt
from vmferry.errors import InvalidArgumentError, WrongPhaseError
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Record, RecordKind
from vmferry.security.authorization import TABLE
from vmferry.security.identity import Identity, Kind
from vmferry.security.override import (
    CONFIRMATION,
    MAX_EVIDENCE_BYTES,
    METHODS,
    Word,
    read_word,
    repeated,
)
from vmferry.v1.override_pb2 import Override

WHO: Final = Identity.parse(ADMIN)
ID: Final = bytes(range(16))


def said(**how: object) -> Override:
    """A complete word, changed."""
    values: dict[str, object] = {"machine": "web", "migration_id": ID.hex(), "evidence": "ipmi 7"}
    return Override(**(values | how))  # type: ignore[arg-type]


def test_the_methods_are_for_admins_alone() -> None:
    """Neither a scheduler nor a host decides by its word."""
    assert {kind for method in METHODS for kind in TABLE[method]} == {Kind.ADMIN}


def test_a_complete_word_says_who_what_and_why() -> None:
    """By default without memory; a confirmation is its own evidence."""
    assert read_word(said(), WHO, only_asked=False) == Word(
        ADMIN, "web", ID, "ipmi 7", with_memory=False, only_asked=False
    )
    assert (
        read_word(said(evidence="", confirmation=CONFIRMATION), WHO, only_asked=False).evidence
        == CONFIRMATION
    )


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"machine": ""}, "machine"),
        ({"migration_id": ""}, "migration_id"),
        ({"migration_id": "00"}, "migration_id"),
        ({"migration_id": "not hexadecimal"}, "migration_id"),
        ({"evidence": ""}, "evidence"),
        ({"evidence": " "}, "evidence"),
        ({"evidence": "two\nlines"}, "evidence"),
        ({"evidence": "x" * (MAX_EVIDENCE_BYTES + 1)}, "evidence"),
        ({"evidence": "", "confirmation": CONFIRMATION + "."}, "confirmation"),
        ({"evidence": "", "confirmation": "yes"}, "confirmation"),
        ({"confirmation": CONFIRMATION}, "confirmation"),
    ],
)
def test_anything_less_is_refused_by_name(how: dict[str, object], field: str) -> None:
    """What is missing or wrong is named, and how to say it."""
    with pytest.raises(InvalidArgumentError) as caught:
        read_word(said(**how), WHO, only_asked=False)
    assert caught.value.field == f"override.{field}"
    assert caught.value.instance_remedy


def test_a_question_needs_neither_evidence_nor_a_migration() -> None:
    """It is about whatever is open; a wrong confirmation is still told."""
    word = read_word(said(evidence="", migration_id=""), WHO, only_asked=True)
    assert word.is_about(ID)
    with pytest.raises(InvalidArgumentError):
        read_word(said(evidence="", confirmation="yes"), WHO, only_asked=True)


def test_the_same_word_twice_is_one_and_another_is_refused() -> None:
    """What was decided stands, whoever says something else."""
    done = Record(
        RecordKind.FORCED, MACHINE, attempt(), epoch=3, note="ipmi 7", operator=ADMIN, with_memory=False
    )
    word = read_word(said(), WHO, only_asked=False)
    report = repeated(word, done, "web", Standing.OWNED)
    assert (report.done, report.epoch, report.operator) == (True, 3, ADMIN)
    for other in (
        read_word(said(evidence="ipmi 8"), WHO, only_asked=False),
        read_word(said(with_memory=True), WHO, only_asked=False),
        read_word(said(), Identity.parse(ADMIN + "-2"), only_asked=False),
    ):
        with pytest.raises(WrongPhaseError, match="decided before"):
            repeated(other, done, "web", Standing.OWNED)
