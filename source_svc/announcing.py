"""Scheduled Events of this host's machines: announced by whoever interrupts one, shown to its guest, and recorded.

Promise: an event that was announced is listed until its interruption is over, or it is given up, also across a
restart of the service; nobody waits longer for a guest than was announced; an operation never fails because of its
event.

Whoever is about to interrupt a machine writes::

    with announcements.announce(spec, pause_s=1.0, description=policy.MAINTENANCE) as event:
        await event.allowed()         # approved by the guest, or its notice is over
        event.started()               # right before the guest is paused
        ...
        event.over(lasted_s=0.05)     # the guest goes on; leaving the block without it gives the event up
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from vmferry.config import HostConfig
from vmferry.events import document, policy, records, states
from vmferry.events.files import ARRIVING, BoardFiles, Stamp
from vmferry.events.instance import Instance
from vmferry.events.protocol import View
from vmferry.events.states import Board, Event, EventSource, EventStatus, EventType
from vmferry.machines.spec import MachineSpec
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import span_event

_LOG: Final = get_logger(__name__)
_NOTED: Final = 0.01
"""Which part of the longest silence a request may be younger than what the disk says of it."""
RESTARTED: Final = "the service that had announced it was restarted"


class Announcements:
    """The boards of all machines of one host."""

    def __init__(self, config: HostConfig, *, is_busy: Callable[[str], bool]) -> None:
        """``is_busy`` says whether something that an earlier process announced is still going on with a machine."""
        self.residents: Sequence[MachineSpec] = ()
        """The machines that are on this host."""
        self.distant: Callable[[str], Sequence[Board]] = lambda _set: ()
        """The boards of a set's machines on other hosts."""
        self._notice_s = config.event_notice_s
        self._minimum = config.event_minimum_notice
        self._idle_s = config.event_idle_s
        self._linger_s = config.event_linger_s
        self._files = BoardFiles(config.events_dir)
        self._is_busy = is_busy
        self._boards: dict[str, tuple[Stamp | None, Board]] = {}
        self._open: dict[str, Announced] = {}
        """What this process has announced and not ended, by event."""
        self._leaving: dict[str, bytes] = {}
        """What is shown to machines whose boards have been handed on."""
        self._asked: dict[str, float] = {}
        """When machines asked for their events last; on disk it may be a little older."""

    def announce(
        self,
        spec: MachineSpec,
        *,
        pause_s: float,
        description: str,
        notice_s: float | None = None,
        event_type: EventType = EventType.FREEZE,
        source: EventSource = EventSource.PLATFORM,
    ) -> Announced:
        """Tell a machine's guest, and those of its availability set, what is to come.

        Args:
            spec: the machine.
            pause_s: how long it is expected to last; negative: not known.
            description: one of those in ``vmferry.events.policy``.
            notice_s: how long to wait for an approval at most; None: as the host is configured.
            event_type: what is to come.
            source: who wants it.
        """
        now_s = time.time()
        if (known := self._unclaimed(spec.uuid, event_type, description)) is not None:
            return self._claimed(spec.uuid, known)
        event = Event(
            id=str(uuid.uuid4()).upper(),
            type=event_type,
            resources=(spec.called,),
            description=description,
            source=source,
            duration_s=-1 if pause_s < 0 else policy.expected_seconds(pause_s),
            announced_s=now_s,
            not_before_s=now_s
            + policy.granted_s(
                event_type,
                self._notice_s if notice_s is None else notice_s,
                minimum=self._minimum,
                listening=self._listening(spec, now_s),
            ),
        )
        self.change(spec.uuid, states.scheduled(self.board(spec.uuid), event))
        announced = self._claimed(spec.uuid, event)
        _LOG.info("announced", machine=spec.uuid, event_id=event.id, type=event.type.value)
        span_event("announced", id=event.id)
        return announced

    def _unclaimed(self, machine_id: str, event_type: EventType, description: str) -> Event | None:
        """What an earlier process announced of the same thing, which goes on: its guest is not told of another."""
        found = (
            event
            for event in self.board(machine_id).events
            if event.id not in self._open and event.status is EventStatus.SCHEDULED
            if (event.type, event.description) == (event_type, description)
        )
        return next(found, None)

    def _claimed(self, machine_id: str, event: Event) -> Announced:
        announced = self._open[event.id] = Announced(self, machine_id, event)
        announced.notice(self.board(machine_id))
        return announced

    def board(self, machine_id: str) -> Board:
        """A machine's board as it is now."""
        stamp = self._files.stamp(machine_id)
        kept = self._boards.get(machine_id)
        if kept is None or kept[0] != stamp:  # the destination service wrote what the machine brought along
            kept = (stamp, self._files.load(machine_id))
            self._boards[machine_id] = kept
        board = kept[1]
        orphans = [event for event in board.events if event.id not in self._open]
        if orphans and not self._is_busy(machine_id):
            for event in orphans:
                board = states.ended(board, event.id, time.time(), why=RESTARTED)
            self.change(machine_id, board)
        return board

    def change(self, machine_id: str, board: Board) -> None:
        """Keep a machine's board."""
        try:
            self._files.store(machine_id, board)
        except OSError as error:
            # The operation that is announced goes on: what cannot be kept is lost with this process.
            _LOG.error("a board of events cannot be written", machine=machine_id, detail=str(error))
        self._boards[machine_id] = (self._files.stamp(machine_id), board)

    def view(self, spec: MachineSpec) -> View:
        """What a machine is shown now."""
        board = self.board(spec.uuid)
        others = [self.board(other.uuid) for other in self._set_of(spec)]
        others += self._from_elsewhere(spec, (board, *others))
        text = self._leaving.get(spec.uuid)
        if text is None:
            array = document.content(self._listed((board, *others)))
            changed = states.shown(board, array)
            if changed is not board:
                board = changed
                self.change(spec.uuid, board)
            text = document.document(board.incarnation, array)
        instance = Instance(spec.called, spec.uuid, spec.macs, spec.availability_set)
        return View(board, others, text, instance)

    def asked(self, machine_id: str) -> None:
        """A machine asks for its events."""
        if not self._idle_s:
            return
        now_s, board = time.time(), self.board(machine_id)
        noted_s = board.asked_s
        board = states.asked(self._with_asked(machine_id, board), now_s, self._idle_s)
        self._asked[machine_id] = now_s
        if now_s - noted_s > self._idle_s * _NOTED:
            self.change(machine_id, board)

    def _with_asked(self, machine_id: str, board: Board) -> Board:
        return replace(board, asked_s=max(board.asked_s, self._asked.get(machine_id, 0.0)))

    def _listening(self, spec: MachineSpec, now_s: float) -> bool:
        """Whether anybody is there to be told: the machine's guest, or one of its set."""
        here = [self._with_asked(one.uuid, self.board(one.uuid)) for one in (spec, *self._set_of(spec))]
        boards = [*here, *self.distant(spec.availability_set)]
        return any(states.listening(board, now_s, self._idle_s) for board in boards)

    def approve(self, spec: MachineSpec, event_ids: Iterable[str]) -> None:
        """A machine approves events that it is shown: its own, and those of its set."""
        self._approve([spec, *self._set_of(spec)], event_ids, spec.called)

    def approve_for(self, availability_set: str, event_ids: Iterable[str], by: str) -> None:
        """A machine of a set that is on another host approves events of those that are here."""
        members = [spec for spec in self.residents if spec.availability_set == availability_set]
        self._approve(members if availability_set else [], event_ids, by)

    def _approve(self, machines: Sequence[MachineSpec], event_ids: Iterable[str], by: str) -> None:
        for event_id in event_ids:
            for machine in machines:
                before = self.board(machine.uuid)
                after = states.approved(before, event_id, by)
                if after != before:
                    self.change(machine.uuid, after)
        for announced in list(self._open.values()):
            announced.notice(self.board(announced.machine_id))

    def started(self, machine_id: str, event_id: str, at_s: float) -> None:
        """The machine's guest is about to be paused.

        What it is shown of that is put down now, and not when it is handed on: that is in the pause.
        """
        self.change(machine_id, states.started(self.board(machine_id), event_id, at_s))
        self._shown_last(machine_id)

    def hand_on(self, machine_id: str, event_id: str) -> bytes:
        """The board as the machine takes it along: there, the event that moved it is over."""
        text = self._shown_last(machine_id)
        if text is not None:
            self._leaving[machine_id] = text
        board = self._with_asked(machine_id, self.board(machine_id))
        if board.find(event_id) is not None:
            board = states.ended(board, event_id, time.time(), why=ARRIVING)
        return records.to_text(board).encode()

    def _shown_last(self, machine_id: str) -> bytes | None:
        """The document of a machine that is here."""
        spec = next((spec for spec in self.residents if spec.uuid == machine_id), None)
        return None if spec is None else self.view(spec).document

    def end(self, machine_id: str, event_id: str, lasted_s: float | None, why: str) -> None:
        """An event is over, or given up."""
        self._open.pop(event_id, None)
        self._leaving.pop(machine_id, None)
        board = self.board(machine_id)
        if board.find(event_id) is not None:
            self.change(machine_id, states.ended(board, event_id, time.time(), lasted_s=lasted_s, why=why))
        _LOG.info("event over", machine=machine_id, event_id=event_id, lasted_s=lasted_s, why=why)

    def leave_open(self, event_id: str) -> None:
        """This process ends before the event does; the next one goes on with it."""
        self._open.pop(event_id, None)

    def _set_of(self, spec: MachineSpec) -> Iterator[MachineSpec]:
        """The other machines of a machine's availability set that are on this host."""
        if spec.availability_set:
            for other in self.residents:
                if other.availability_set == spec.availability_set and other.uuid != spec.uuid:
                    yield other

    def _from_elsewhere(self, spec: MachineSpec, here: Sequence[Board]) -> list[Board]:
        """What other hosts tell of the set, but for what this host knows better: a machine may be on its way."""
        known = {one.event.id for board in here for one in board.ended}
        known |= {event.id for board in here for event in board.events}
        return [
            replace(
                board,
                events=tuple(event for event in board.events if event.id not in known),
                ended=tuple(one for one in board.ended if one.event.id not in known),
            )
            for board in self.distant(spec.availability_set)
        ]

    def _listed(self, boards: Iterable[Board]) -> list[Event]:
        now_s = time.time()
        found = [event for board in boards for event in states.listed(board, now_s, self._linger_s)]
        return sorted(found, key=lambda event: (event.announced_s, event.id))


class Announced:
    """One event, in the hands of whoever interrupts the machine."""

    def __init__(self, announcements: Announcements, machine_id: str, event: Event) -> None:
        self.id = event.id
        self.machine_id = machine_id
        self._announcements = announcements
        self._event = event
        self._began, self._began_s = time.monotonic(), max(time.time(), event.announced_s)
        self._approved = asyncio.Event()
        self._over = False

    @property
    def notice_s(self) -> float:
        """How long the guest is told beforehand, if it does not approve earlier."""
        return self._event.not_before_s - self._event.announced_s

    async def allowed(self) -> None:
        """Wait until the guest approves the event, for no longer than it was given notice."""
        left_s = self._event.not_before_s - self._now_s()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, left_s)):
                await self._approved.wait()
        by = self._announcements.board(self.machine_id).find(self.id)
        span_event("allowed", approved_by=by.approved_by if by is not None else "")

    def notice(self, board: Board) -> None:
        """Somebody approved something."""
        event = board.find(self.id)
        if event is not None and event.approved_by:
            self._approved.set()

    def started(self) -> None:
        """The guest is about to be paused."""
        self._announcements.started(self.machine_id, self.id, self._now_s())

    def hand_on(self) -> bytes:
        """What the machine takes along to another host; from now on its guest is shown nothing new here."""
        return self._announcements.hand_on(self.machine_id, self.id)

    def over(self, *, lasted_s: float | None = None, why: str = "") -> None:
        """The guest goes on, or it is not to be interrupted after all; what comes later changes nothing."""
        if not self._over:
            self._over = True
            self._announcements.end(self.machine_id, self.id, lasted_s, why)

    def leave_open(self) -> None:
        """The service ends, and its next start goes on."""
        self._over = True
        self._announcements.leave_open(self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over(why="" if error is None else f"given up: {error!r}"[:200])

    def _now_s(self) -> float:
        """The time of day, by a clock that nobody sets back meanwhile."""
        return self._began_s + time.monotonic() - self._began
