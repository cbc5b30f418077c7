"""The resume gate: where it is decided who may run the guest.

Promise: a hypervisor adapter resumes a guest only when handed a :class:`ResumePermit`, and :func:`mint` makes one
only if this host's journals, already on disk, say that the host owns the machine and has no open outgoing attempt
(``Rights.permitted``, invariant I1b of docs/handoff.md). A second kind, made by :func:`mint_held_back`, is for a
guest that was held for a moment while it is being copied: an attempt is open, but nothing of it is sealed, so the
destination is far from any right (``Rights.runs_on``). A third, made by :func:`mint_for_update`, is for the new
process of an update in place, once nothing can let the old one run any more (``Rights.may_let_run``). There is no
other way.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Final, NoReturn

from vmferry.errors import JournalDamagedError, MachineBusyError, MachineNotOwnedError
from vmferry.handoff.rights import Rights

_SEAL: Final = object()


@dataclass(frozen=True)
class ResumePermit:
    """The right to start one machine's virtual CPUs, backed by a durable record. Made in this module only."""

    machine_id: str
    epoch: int
    seal: InitVar[object] = None

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a resume permit is minted by the gate, never constructed")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a resume permit is used where it was minted, never copied or stored")


def mint(machine_id: str, durable: Rights) -> ResumePermit:
    """A permit for this machine, if the durable journals allow it.

    Raises:
        JournalDamagedError: a journal cannot be trusted, so nobody may resume automatically.
        MachineNotOwnedError: the right to run is elsewhere, or on its way.
        MachineBusyError: the machine is being updated in place.
    """
    if durable.damaged:
        raise JournalDamagedError(f"the journal of machine {machine_id} is damaged", machine=machine_id)
    if durable.owner and durable.being_updated:
        raise MachineBusyError(f"machine {machine_id} is being updated in place", machine=machine_id)
    if not durable.permitted:
        raise MachineNotOwnedError(
            f"this host may not run machine {machine_id}: {durable.standing.name}", machine=machine_id
        )
    return ResumePermit(machine_id, durable.epochs.granted, _SEAL)


def mint_held_back(machine_id: str, now: Rights) -> ResumePermit:
    """A permit to let a guest go on that is held back while its machine is being copied.

    Raises:
        MachineNotOwnedError: nothing is being copied, or the guest is paused for its hand-off.
    """
    if not now.runs_on:
        raise MachineNotOwnedError(
            f"machine {machine_id} is not being copied from here: {now.standing.name}", machine=machine_id
        )
    return ResumePermit(machine_id, now.epochs.granted, _SEAL)


def mint_for_update(machine_id: str, now: Rights) -> ResumePermit:
    """A permit for the new process of an update in place.

    Raises:
        MachineNotOwnedError: no update is that far, or the right to run has gone elsewhere.
    """
    if not now.may_let_run:
        raise MachineNotOwnedError(
            f"no new process may run machine {machine_id}: {now.standing.name}", machine=machine_id
        )
    return ResumePermit(machine_id, now.epochs.granted, _SEAL)
