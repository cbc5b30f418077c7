"""A fleet's update as it is carried out: each host lets go of what cannot stay, is updated, and is whole again.

Promise: what is done next is decided by ``rollout`` and ``ways`` on what the journal says; each step that cannot be
looked up afterwards is in the journal before it is done; the first host that fails ends everything that has not
begun, and what is under way elsewhere is brought to its end. A run that follows on another asks the hosts where the
machines are::

    each machine: stays or leaves -> the others leave -> command -> healthy -> those that stayed: updated in place
        (one that cannot be after all leaves) -> healthy -> all come back
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from vmferry.client.draining import new_request_id
from vmferry.errors import VmferryError
from vmferry.fleet import rollout
from vmferry.fleet.hosts import HostFailedError, Hosts, Resident
from vmferry.fleet.journal import Journal
from vmferry.fleet.plan import Plan
from vmferry.fleet.rollout import Entry, Kind, Stage
from vmferry.fleet.ways import way

Say = Callable[[str], None]
_OF_HOSTS: Final = frozenset({Kind.BEGUN, Kind.EMPTY, Kind.UPDATED, Kind.DONE, Kind.FAILED, Kind.RETRIED})
_LONGEST_NOTE: Final = 500
_ELSEWHERE: Final = "elsewhere"
"""Stands for a host that is asked for when it matters."""


class Update:
    """One run."""

    def __init__(self, plan: Plan, journal: Journal, hosts: Hosts, say: Say) -> None:
        self._plan = plan
        self._journal = journal
        self._hosts = hosts
        self._say = say

    async def run(self) -> str:
        """Update all hosts that are not done; returns why it came to a halt, or nothing."""
        for name in self._journal.progress.failed:
            self._write(name, Kind.RETRIED)
        running = {asyncio.create_task(self._host(name)) for name in self._journal.progress.down}
        try:
            while True:
                if not running and (why := await self._between()):
                    return why
                for name in rollout.may_begin(self._plan, self._journal.progress):
                    self._write(name, Kind.BEGUN)
                    running.add(asyncio.create_task(self._host(name)))
                if not running:
                    break
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.gather(*done)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        progress = self._journal.progress
        return "; ".join(f"{name}: {progress.of(name).note}" for name in progress.failed)

    async def _between(self) -> str:
        """Look at what has been updated before anything else begins."""
        progress = self._journal.progress
        if progress.failed or rollout.finished(self._plan, progress):
            return ""
        for host in self._plan.hosts:
            if progress.of(host.name).stage is Stage.DONE:
                wrong = await self._hosts.unhealthy(host.name)
                if wrong:
                    return f"{host.name} was updated, and is not healthy: {wrong}"
        return ""

    async def _host(self, name: str) -> None:
        try:
            if not self._of(name).empty:
                await self._clear(name)
                self._write(name, Kind.EMPTY)
            if not self._of(name).updated:
                if self._plan.update.command:
                    self._say(f"{name}: the command runs")
                    await self._hosts.command(name)
                self._write(name, Kind.UPDATED)
            await self._well(name)
            await self._look_after_departures(name)
            if self._of(name).stays:
                await self._renew_all(name)
                await self._well(name)
            await self._hosts.undrain(name)
            for machine in list(self._of(name).away):
                await self._bring_back(name, machine)
        except (HostFailedError, VmferryError, OSError) as error:
            self._write(name, Kind.FAILED, note=str(error)[:_LONGEST_NOTE])
        else:
            self._write(name, Kind.DONE)

    async def _well(self, name: str) -> None:
        if wrong := await self._hosts.wait_healthy(name):
            raise HostFailedError(wrong)

    # Away

    async def _clear(self, name: str) -> None:
        """Find out which way each machine goes, and have those leave that cannot stay."""
        here = {one.id: one for one in await self._hosts.machines(name)}
        for machine in list(self._of(name).stays):
            if machine not in here:
                self._write(name, Kind.RENEWED, machine, note="it does not run here any more")
        leaving = [here[machine] for machine in self._of(name).away if machine in here]
        for machine, away in list(self._of(name).away.items()):
            if machine not in here and not away.target:  # it left as an earlier run ended
                self._write(
                    name, Kind.LEFT, machine, target=await self._hosts.owner(machine, ()) or _ELSEWHERE
                )
        for one in here.values():
            if one.id in self._of(name).away:
                continue
            found = await self._hosts.obstacles(name, one.id) if self._plan.in_place else []
            chosen = way(self._plan, found, commanded=False)
            self._say(f"{one.name}: {'stays' if chosen.in_place else 'leaves'}: {chosen.why}")
            if chosen.in_place:
                if one.id not in self._of(name).stays:
                    self._write(name, Kind.STAYS, one.id)
            else:
                leaving.append(one)
        await self._send_away(name, leaving)

    async def _send_away(self, name: str, leaving: Sequence[Resident]) -> None:
        """Have the host drained of these machines: by the hosts that suit them best, then by more and more others."""
        progress = self._journal.progress
        for one in leaving:
            self._write(name, Kind.LEAVING, one.id)
        left = {one.id: one for one in leaving}

        def note(machine: str, target: str) -> None:
            self._write(name, Kind.LEFT, machine, target=target or _ELSEWHERE)
            self._say(f"{left.pop(machine).name}: {name} -> {target or _ELSEWHERE}")

        sets = {one.availability_set for one in leaving if one.availability_set}
        tiers = rollout.tiers(self._plan, progress, name, sets)
        names: list[str] = []
        why: dict[str, str] = dict.fromkeys(left, "no other host is up")
        for number, tier in enumerate(tiers):
            names += tier
            patience_s = self._plan.update.patience_s if number == len(tiers) - 1 else 0.0
            why = dict(await self._hosts.drain(name, list(left), names, patience_s, note))
            if not left:
                return
        for machine in list(left):  # one that was already on its way may be noted nowhere
            if (target := await self._hosts.owner(machine, ())) not in ("", name):
                note(machine, target)
        if left:
            one = next(iter(left.values()))
            raise HostFailedError(f"{one.name} cannot be moved away: {why.get(one.id, 'it stays')}")

    async def _look_after_departures(self, name: str) -> None:
        """Machines that were to leave when an earlier run ended have left, or are to be updated where they are."""
        unsure = [machine for machine, away in self._of(name).away.items() if not away.target]
        for machine in unsure:
            at = await self._hosts.owner(machine, ())
            if at == name:
                self._write(name, Kind.STAYS, machine)
            elif at:
                self._write(name, Kind.LEFT, machine, target=at)

    async def _bring_back(self, name: str, machine: str) -> None:
        elsewhere = await self._hosts.owner(machine, [self._of(name).away[machine].target])
        if not elsewhere:
            raise HostFailedError(f"machine {machine} is at no host of the plan that answers")
        if elsewhere != name:
            await self._hosts.bring(machine, elsewhere, name)
            self._say(f"{machine}: {elsewhere} -> {name}")
        self._write(name, Kind.RETURNED, machine)

    # In place

    async def _renew_all(self, name: str) -> None:
        here = {one.id: one for one in await self._hosts.machines(name)}
        for machine in list(self._of(name).stays):
            if machine not in here:
                self._write(name, Kind.RENEWED, machine, note="it does not run here any more")
            elif why := await self._renewed(name, machine):
                self._say(f"{here[machine].name}: leaves after all: {why}")
                await self._send_away(name, [here[machine]])
            else:
                self._write(name, Kind.RENEWED, machine)
                self._say(f"{here[machine].name}: updated in place")

    async def _renewed(self, name: str, machine: str) -> str:
        """Update a machine in place; returns why that cannot be, or nothing."""
        begun = self._of(name).stays[machine]
        if begun and not await self._hosts.renew(name, machine, begun):
            return ""  # that of an earlier run, which has come to its end or was not known any more
        chosen = way(self._plan, await self._hosts.obstacles(name, machine), commanded=True)
        if not chosen.in_place:
            return chosen.why
        request_id = new_request_id()
        self._write(name, Kind.RENEWING, machine, request_id=request_id)
        return await self._hosts.renew(name, machine, request_id)

    # The rest

    def _of(self, name: str) -> rollout.HostProgress:
        return self._journal.progress.of(name)

    def _write(
        self,
        name: str,
        kind: Kind,
        machine: str = "",
        *,
        target: str = "",
        request_id: str = "",
        note: str = "",
    ) -> None:
        self._journal.write(Entry(name, kind, machine, target, request_id, note))
        if kind in _OF_HOSTS:
            self._say(f"{name}: {kind.value}" + (f": {note}" if note else ""))
