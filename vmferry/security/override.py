"""The operator's word: what must be said before a person decides about a hand-off, and the trail that it leaves.

Promise: a :class:`Word` that exists names who said it, by certificate, what it decides about, and either evidence or
the exact confirmation that the other copy is powered off. Everybody who tried is in the log, whatever came of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from vmferry.errors import InvalidArgumentError, VmferryError, WrongPhaseError
from vmferry.handoff.choices import CONFIRMATION
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Record
from vmferry.security.identity import Identity
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import span_event
from vmferry.v1 import machine_pb2
from vmferry.v1 import override_pb2 as pb

RECLAIM: Final = "force-reclaim"
ACCEPT: Final = "force-accept"
METHODS: Final = {
    "/vmferry.v1.SourceService/ForceReclaim": RECLAIM,
    "/vmferry.v1.DestinationService/ForceAccept": ACCEPT,
}
"""What is decided by each of the methods that take an operator's word."""
MAX_EVIDENCE_BYTES: Final = 256
_ID_BYTES: Final = 16
_SAY_IT: Final = f'Give evidence that the other copy cannot run, or confirm with exactly: "{CONFIRMATION}".'
_LOG: Final = get_logger(__name__)


@dataclass(frozen=True)
class Word:
    """What an operator decides, or asks about."""

    operator: str
    machine: str
    migration_id: bytes
    """Empty only where ``only_asked``: whichever is open."""
    evidence: str
    """What shows that the other copy cannot run; empty only where ``only_asked``."""
    with_memory: bool
    only_asked: bool
    """Nothing is to be changed."""

    def is_about(self, migration_id: bytes) -> bool:
        """Whether it may decide about this migration."""
        return self.migration_id == migration_id or (self.only_asked and not self.migration_id)


async def by_word(
    action: str,
    override: pb.Override,
    operator: Identity,
    decide: Callable[[Word], Awaitable[pb.OverrideReport]],
    *,
    only_asked: bool,
) -> pb.OverrideReport:
    """Read an operator's word, act on it, and note who said what and what came of it."""
    try:
        report = await decide(read_word(override, operator, only_asked=only_asked))
    except Exception as error:
        reason = error.reason if isinstance(error, VmferryError) else "INTERNAL"
        _note(action, "refused", operator, override, reason=reason, detail=str(error))
        raise
    verdict = "granted" if report.done else "validated"
    _note(action, verdict, operator, override, machine_id=report.machine_id, epoch=report.epoch)
    return report


def read_word(override: pb.Override, operator: Identity, *, only_asked: bool) -> Word:
    """The word that a message says.

    Raises:
        InvalidArgumentError: it does not say what it must; the field that is at fault is named.
    """
    if not override.machine:
        raise InvalidArgumentError("a machine is required", field="override.machine")
    return Word(
        operator.uri,
        override.machine,
        _migration_id(override.migration_id, only_asked=only_asked),
        _evidence(override, only_asked=only_asked),
        override.with_memory,
        only_asked,
    )


def repeated(word: Word, done: Record, name: str, standing: Standing) -> pb.OverrideReport:
    """The answer to a word about what was decided before.

    Raises:
        WrongPhaseError: it says something else than what was acted on; a question may say anything.
    """
    assert done.attempt is not None
    said = (word.operator, word.evidence, word.with_memory)
    if not word.only_asked and said != (done.operator, done.note, done.with_memory):
        how = "with" if done.with_memory else "without"
        raise WrongPhaseError(
            f"it was decided before, by {done.operator}, {how} memory, on: {done.note}",
            remedy="Nothing needs to be done: what was decided stands.",
        )
    return pb.OverrideReport(
        machine=name,
        machine_id=done.machine_id,
        migration_id=done.attempt.migration_id.hex(),
        right=machine_pb2.MachineRight.ValueType(standing.value),
        epoch=done.epoch,
        done=True,
        operator=done.operator,
        evidence=done.note,
        with_memory=done.with_memory,
        effects=["It was decided before; nothing changes."],
    )


def note_denied(method: str, caller: Identity, error: VmferryError) -> None:
    """Note that somebody who is no admin called a method that takes an operator's word."""
    if method in METHODS:
        _note(METHODS[method], "refused", caller, pb.Override(), reason=error.reason, detail=error.message)


def _migration_id(text: str, *, only_asked: bool) -> bytes:
    if not text and only_asked:
        return b""
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != _ID_BYTES:
        raise InvalidArgumentError(
            "the migration that is decided about must be named",
            field="override.migration_id",
            remedy="Take it from a call with validate_only (vmferry handoff ... --dry-run).",
        )
    return found


def _evidence(override: pb.Override, *, only_asked: bool) -> str:
    if override.confirmation and override.confirmation != CONFIRMATION:
        raise InvalidArgumentError(
            "the confirmation is not the one that is asked for", field="override.confirmation", remedy=_SAY_IT
        )
    evidence = override.evidence
    if (
        not evidence.isprintable()
        or len(evidence.encode()) > MAX_EVIDENCE_BYTES
        or evidence != evidence.strip()
    ):
        raise InvalidArgumentError(
            f"evidence is one line of at most {MAX_EVIDENCE_BYTES} bytes", field="override.evidence"
        )
    if evidence and override.confirmation:
        raise InvalidArgumentError(
            "give evidence or the confirmation, not both", field="override.confirmation"
        )
    if not (evidence or override.confirmation or only_asked):
        raise InvalidArgumentError(
            "nothing shows that the other copy cannot run", field="override.evidence", remedy=_SAY_IT
        )
    return evidence or override.confirmation


def _note(action: str, verdict: str, operator: Identity, override: pb.Override, **more: object) -> None:
    said = {
        "action": action,
        "verdict": verdict,
        "operator": operator.uri,
        "machine": override.machine,
        "migration": override.migration_id,
        "evidence": override.evidence or override.confirmation,
        "with_memory": override.with_memory,
        **more,
    }
    _LOG.warning("operator override", **said)
    span_event("operator override", **said)
