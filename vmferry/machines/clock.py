"""The guest's clock after a pause: how far it is off, and what the machine offers to put it right.

A guest's own time stands still while it is paused, so it is behind by as much as the pause took. What can be done
depends on the machine:

* the micro-VM's clock device answers with the host's time of day whenever its guest asks, so it is right at once;
* a Linux guest in QEMU reads its RTC, which goes by the host's clock and is right, when it boots and then no more;
  an agent in it is told the time, if the machine has a channel for one and the guest's agent has opened it;
* without an agent nothing is corrected. QEMU forgets the ticks of the RTC that it owes, which would come in a burst.

Promise: no guest is waited for longer than the caller allows, nothing here is part of a pause, and nothing raises. A
clock is only ever set forward: one that is not behind for certain, by more than the agent took to answer, is left as
it is and reported. What was not read from a clock of the guest is not called measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from vmferry.errors import MachineFailedError, VmferryError
from vmferry.machines.agent import Agent, AgentError, AgentRefusedError, Reading, conversation
from vmferry.machines.command import AGENT_CHARDEV
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import QEMU
from vmferry.telemetry.metrics import record_clock
from vmferry.telemetry.tracing import phase, span_attributes
from vmferry.v1 import clock_pb2

CLOCK_DEVICE: Final = "clock-device"
GUEST_AGENT: Final = "guest-agent"
RTC: Final = "rtc"
NONE: Final = "none"
METHODS: Final = (CLOCK_DEVICE, GUEST_AGENT, RTC, NONE)

_READINGS: Final = 3
_ROUNDS: Final = 5
"""How often a guest that answers slowly is read anew."""
_TRIES: Final = 3
"""How often a clock is set at most: an agent that was slow to do so leaves it behind by that."""
_SAFE: Final = 3
"""A clock is set only if it is behind by so many times what the slowest of the last answers took: the time that an
agent is given grows old until the agent comes to it, and must still be later than the guest's own."""
_NO_AGENT: Final = (
    "clock: not corrected; no agent. The guest's RTC is right, and its system clock stays behind by the pause until "
    "it asks the RTC (hwclock --hctosys) or the network."
)


@dataclass(frozen=True)
class ClockFinding:
    """What was found and done."""

    before_us: int
    """Guest minus host, right after the pause."""
    after_us: int
    method: str
    measured: bool
    note: str = ""
    uncertainty_us: int = 0


async def put_right(machine: QmpMachine, pause_s: float | None, *, agent_timeout_s: float) -> ClockFinding:
    """Put the clock of a guest right that was paused for so long; what cannot be done is said, and raises nothing.

    It is a span of its own, and counted.

    Args:
        machine: runs the guest; whoever holds it may find its connection closed.
        pause_s: None if that is not known here; what is not measured is then said to be 0.
        agent_timeout_s: how long an agent may take for everything.
    """
    behind_us = -round((pause_s or 0) * 1e6)
    async with phase("clock"):
        try:
            if machine.spec.kind == QEMU:
                found = await _qemu(machine, behind_us, agent_timeout_s)
            else:
                found = await _device(machine, behind_us)
        except VmferryError as error:
            found = ClockFinding(behind_us, behind_us, NONE, measured=False, note=error.message)
        span_attributes(
            clock_method=found.method,
            clock_offset_before_us=found.before_us,
            clock_offset_after_us=found.after_us,
            clock_measured=found.measured,
        )
        if found.measured or pause_s is not None:
            count(found)
    return found


def count(found: ClockFinding) -> None:
    """Note it in the metrics of this host, once."""
    record_clock(method=found.method, before_s=found.before_us / 1e6, after_s=found.after_us / 1e6)


def is_safe(readings: Sequence[Reading]) -> bool:
    """Whether a guest may be given the time: it is behind by far more than the agent takes to set it."""
    behind_ns = min(-reading.most_ns for reading in readings)
    return behind_ns > _SAFE * max(reading.took_ns for reading in readings)


def finding_of(message: clock_pb2.ClockReport, pause_s: float | None = None) -> ClockFinding:
    """What another host found, which does not know how long the pause was."""
    found = ClockFinding(
        message.offset_before_us,
        message.offset_after_us,
        message.method if message.method in METHODS else NONE,
        measured=message.measured,
        note=message.note[:500],
        uncertainty_us=message.uncertainty_us,
    )
    if found.measured or pause_s is None:
        return found
    behind_us = -round(pause_s * 1e6)
    return replace(found, before_us=behind_us, after_us=0 if found.method == CLOCK_DEVICE else behind_us)


def tell(found: ClockFinding, message: clock_pb2.ClockReport) -> None:
    """Write it into a message."""
    message.offset_before_us, message.offset_after_us = found.before_us, found.after_us
    message.method, message.measured, message.note = found.method, found.measured, found.note
    message.uncertainty_us = found.uncertainty_us


async def told_ns(machine: QmpMachine) -> int:
    """The latest time of day that the guest of a paused micro-VM can have read; 0 if nobody knows, or needs to."""
    if machine.spec.kind == QEMU:
        return 0
    answer = await _if_known(machine, "x-query-clock")
    return _number(answer, "told-ns") or 0


async def keep(machine: QmpMachine, realtime_ns: int) -> None:
    """See that a micro-VM that waits with another one's state never tells its guest an earlier time than this."""
    if machine.spec.kind != QEMU and realtime_ns:
        await _if_known(machine, "x-keep-clock", {"realtime-ns": realtime_ns})


async def _device(machine: QmpMachine, behind_us: int) -> ClockFinding:
    asked_ns = time.time_ns()
    answer = await _if_known(machine, "x-query-clock")
    answered_ns = time.time_ns()
    guest_ns = _number(answer, "realtime-ns")
    if guest_ns is None:
        return ClockFinding(behind_us, 0, CLOCK_DEVICE, measured=False, note="an older micro-VM does not say")
    # Somewhere between question and answer: what is beyond either is off for certain.
    off_ns = min(guest_ns - asked_ns, 0) + max(guest_ns - answered_ns, 0)
    before_ns = _number(answer, "offset-at-start-ns")
    before_us = behind_us if before_ns is None else round(before_ns / 1e3)
    note = ""
    if off_ns > 0:
        note = (
            "The guest was told a later time than this host's; its clock runs at half speed until this host's has "
            "caught up. Synchronise the hosts' clocks."
        )
    return ClockFinding(before_us, round(off_ns / 1e3), CLOCK_DEVICE, measured=True, note=note)


async def _qemu(machine: QmpMachine, behind_us: int, agent_timeout_s: float) -> ClockFinding:
    await machine.ask("rtc-reset-reinjection")
    assert machine.spec.qemu is not None
    if not machine.spec.qemu.agent:
        return ClockFinding(behind_us, behind_us, RTC, measured=False, note=_NO_AGENT)
    if not await _has_agent(machine):
        note = f"The guest has not opened the channel for its agent. {_NO_AGENT}"
        return ClockFinding(behind_us, behind_us, RTC, measured=False, note=note)
    await machine.close()  # for whoever else wants something of it, while the guest takes its time
    return await _by_agent(machine, behind_us, agent_timeout_s)


async def _has_agent(machine: QmpMachine) -> bool:
    answer = await machine.ask("query-chardev")
    try:
        return any(one["label"] == AGENT_CHARDEV and one["frontend-open"] is True for one in answer)
    except (KeyError, TypeError) as error:
        raise MachineFailedError(
            "query-chardev: an answer without sense", machine=machine.spec.uuid
        ) from error


async def _by_agent(machine: QmpMachine, behind_us: int, limit_s: float) -> ClockFinding:
    talk = _Talk(behind_us)
    try:
        async with asyncio.timeout(limit_s), conversation(machine.paths.agent_socket) as agent:
            await talk.go_through(agent)
    except TimeoutError:
        talk.failed(f"The guest's agent did not answer within {limit_s:g} s.")
    except AgentError as error:
        talk.failed(f"{error.message[:1].upper()}{error.message[1:]}.")
    return talk.finding


class _Talk:
    """What is known, however far a conversation gets."""

    def __init__(self, behind_us: int) -> None:
        self.finding = ClockFinding(behind_us, behind_us, NONE, measured=False)
        self._set = False

    async def go_through(self, agent: Agent) -> None:
        """Read the clock, set it if that is safe, and read it again."""
        await agent.synchronise()
        best = await self._until_safe(agent)
        if best is None:
            return
        self._set = True
        for _ in range(_TRIES):
            refused = await self._told(agent, best.took_ns // 2)
            readings = [await agent.read_clock() for _ in range(_READINGS)]
            after = _best(readings)
            if refused or not is_safe(readings):
                break
        self.finding = replace(
            self.finding,
            after_us=after.offset_us,
            method=GUEST_AGENT,
            uncertainty_us=max(_half(best), _half(after)),
            note=_about(best, after, refused=refused),
        )

    async def _until_safe(self, agent: Agent) -> Reading | None:
        """The best reading once the clock can be set; None if it cannot."""
        every: list[Reading] = []
        for _ in range(_ROUNDS):
            every += (last := [await agent.read_clock() for _ in range(_READINGS)])
            best = _best(every)
            us = best.offset_us
            self.finding = ClockFinding(us, us, NONE, measured=True, uncertainty_us=_half(best))
            if is_safe(last):
                return best
            if best.most_ns > 0:
                break
        self.finding = replace(self.finding, note=_why_not(best))
        return None

    async def _told(self, agent: Agent, lead_ns: int) -> bool:
        """Give it the time; whether it said that this failed, which it may say after it has set its clock."""
        try:
            await agent.set_clock(lead_ns)
        except AgentRefusedError:
            return True
        return False

    def failed(self, why: str) -> None:
        """It ended early."""
        if self._set:
            why = f"{why} It had been given the time, and may have set its clock."
        self.finding = replace(self.finding, measured=False, note=why)


def _best(readings: Sequence[Reading]) -> Reading:
    return min(readings, key=lambda reading: reading.took_ns)


def _half(reading: Reading) -> int:
    return -(-reading.took_ns // 2000)


def _why_not(best: Reading) -> str:
    if best.least_ns > 0:
        return (
            "The guest's clock is ahead of this host's, and a clock is never set back: it was left as it is."
        )
    return "The guest's clock is behind by so little that setting it might set it back: it was left as it is."


def _about(before: Reading, after: Reading, *, refused: bool) -> str:
    if after.most_ns < before.least_ns:
        return "The guest's agent took longer to set the clock than it was behind, and so has set it back."
    if refused:
        return (
            "The guest's agent said that it failed; see the offsets for what it did (it needs /sbin/hwclock)."
        )
    return ""


async def _if_known(machine: QmpMachine, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """The answer, or None of a micro-VM that does not know the command."""
    try:
        return await machine.ask(command, arguments)
    except MachineFailedError as error:
        if error.metadata.get("error_class") == "CommandNotFound":
            return None
        raise


def _number(answer: Any, name: str) -> int | None:
    value = answer.get(name) if isinstance(answer, dict) else None
    return value if type(value) is int else None
