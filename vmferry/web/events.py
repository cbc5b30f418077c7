"""What the page shows, and telling all who look at it when that changes.

Promise: the service is asked a few times a second while anybody looks, and not at all otherwise, and what moves is
never held up by it; whoever reads too slowly skips what is in between; an idle stream says so every few seconds, so
that a dead one is noticed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from aiohttp import web
from google.protobuf.json_format import MessageToDict

from vmferry import __version__
from vmferry.config import HostConfig
from vmferry.drain.record import DrainFile
from vmferry.errors import ConfigError, VmferryError
from vmferry.v1.machine_pb2 import Machine, MachineRight, MachineState
from vmferry.v1.migration_pb2 import MIGRATION_PHASE_ENDED, MIGRATION_PHASE_QUEUED, Migration
from vmferry.web.view import View

_EVERY_S: Final = 0.25
_MACHINES_EVERY_S: Final = 1.0
"""Hypervisors and journals are asked less often than what is in memory."""
_HISTORY_EVERY_S: Final = 5.0
"""The disk is asked when a migration has ended, and else only so often."""
_ALIVE_S: Final = 10.0
_MOST_WATCHERS: Final = 32
_MOST_ENDED: Final = 200
_MOST_OPEN: Final = 50
"""Those that are on their way are shown before those that wait."""
_STATE, _HISTORY = "state", "history"
"""The two kinds of events: what goes on, and what has ended, which is long and seldom changes."""

Document = dict[str, Any]


class Feed:
    """The state of a service for those who look at its page."""

    def __init__(self, role: str, host: str, config: HostConfig, views: Sequence[View]) -> None:
        self._about = {"service": role, "host": host, "version": __version__}
        self._takes_none = config.draining
        self._drain_file = DrainFile(config.state_dir)
        self._drain: Document = {}
        self._views = views
        self._watchers: set[asyncio.Event] = set()
        self._wanted = asyncio.Event()
        self._ended = asyncio.Event()
        self._current = {_STATE: "", _HISTORY: ""}
        self._machines: list[Document] = []
        self._asked_machines_at = -_MACHINES_EVERY_S
        self._history = "[]"
        self._history_of: object = None
        self._asked_history_at = 0.0
        self._asking = asyncio.Lock()

    async def running(self, _app: web.Application) -> AsyncIterator[None]:
        """Keep those who watch up to date meanwhile."""
        task = asyncio.create_task(self._follow())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def end(self, _app: web.Application) -> None:
        """End all streams."""
        self._ended.set()
        for watcher in self._watchers:
            watcher.set()

    async def state(self, _request: web.Request) -> web.StreamResponse:
        """Answer with everything."""
        now = await self._now()
        text = f'{now[_STATE][:-1]},"history":{now[_HISTORY]}}}'
        return web.Response(text=text, content_type="application/json")

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Answer with everything whenever something has changed."""
        if len(self._watchers) >= _MOST_WATCHERS:
            raise web.HTTPServiceUnavailable(reason="Too many are watching")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        watcher = asyncio.Event()
        self._watchers.add(watcher)
        self._wanted.set()
        try:
            await self._tell(response, watcher)
        except ConnectionError:
            pass  # whoever watched has gone
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                self._wanted.clear()
        return response

    async def _tell(self, response: web.StreamResponse, watcher: asyncio.Event) -> None:
        sent = {_STATE: "", _HISTORY: ""}
        while not self._ended.is_set():
            # The history comes first: what has just ended is nowhere for a moment, rather than twice.
            for kind in (_HISTORY, _STATE):
                if self._current[kind] != sent[kind]:
                    sent[kind] = self._current[kind]
                    await response.write(f"event: {kind}\ndata: {sent[kind]}\n\n".encode())
            watcher.clear()
            try:
                async with asyncio.timeout(_ALIVE_S):
                    await watcher.wait()
            except TimeoutError:
                await response.write(b": nothing new\n\n")

    async def _follow(self) -> None:
        while True:
            await self._wanted.wait()
            now = await self._now()
            if now != self._current:
                self._current = now
                for watcher in self._watchers:
                    watcher.set()
            await asyncio.sleep(_EVERY_S)

    async def _now(self) -> dict[str, str]:
        """Both kinds of events, as they would be told now."""
        async with self._asking:
            if time.monotonic() - self._asked_machines_at > _MACHINES_EVERY_S:
                self._machines = [_machine(one) for view in self._views for one in await _machines_of(view)]
                self._drain = await asyncio.to_thread(_drain, self._drain_file)
                self._asked_machines_at = time.monotonic()
            migrations = [one for view in self._views for one in view.open_migrations()]
            await self._renew_history({one.id for one in migrations})
            migrations.sort(key=lambda one: (one.phase == MIGRATION_PHASE_QUEUED, one.queue.position))
            arrivals = [dataclasses.asdict(one) for view in self._views for one in view.arrivals()]
            state = self._about | {
                "draining": self._takes_none or self._drain_file.draining,
                "drain": self._drain,
                "machines": self._machines,
                "migrations": [_migration(one) for one in migrations[:_MOST_OPEN]],
                "open": len(migrations),
                "arrivals": arrivals,
            }
            return {_STATE: json.dumps(state, separators=(",", ":")), _HISTORY: self._history}

    async def _renew_history(self, open_ids: set[str]) -> None:
        """Ask for what has ended, if something may have since the last time."""
        fresh = time.monotonic() - self._asked_history_at < _HISTORY_EVERY_S
        if fresh and self._history_of == open_ids:
            return
        found = [one for view in self._views for one in await view.migrations(limit=_MOST_ENDED)]
        ended = [one for one in found if one.phase == MIGRATION_PHASE_ENDED]
        # It may be long; whatever moves must not wait for it.
        self._history = await asyncio.to_thread(
            lambda: json.dumps([_migration(one) for one in ended], separators=(",", ":"))
        )
        self._history_of, self._asked_history_at = open_ids, time.monotonic()


async def _machines_of(view: View) -> Sequence[Machine]:
    try:
        return await view.machines()
    except (
        VmferryError,
        OSError,
    ):  # a machine that ends while it is looked at; the next look is a moment away
        return []


def _drain(file: DrainFile) -> Document:
    """How far the host has been emptied, if it is being; what was signed for that is nobody's business here."""
    try:
        record = file.read()
    except ConfigError as error:
        return {
            "problem": {"reason": error.reason, "message": error.message, "remedy": error.instance_remedy}
        }
    if record is None or not record.draining:
        return {}
    return MessageToDict(record.drain, preserving_proto_field_name=True)


def _machine(machine: Machine) -> Document:
    """What the page shows of a machine; its description may hold what is not for everybody on this host."""
    document: Document = {
        "name": machine.name,
        "uuid": machine.uuid,
        "kind": machine.spec.kind,
        "memory_mib": machine.spec.memory_mib,
        "vcpus": machine.spec.vcpus,
        "state": MachineState.Name(machine.state).removeprefix("MACHINE_STATE_").lower(),
        "right": MachineRight.Name(machine.right).removeprefix("MACHINE_RIGHT_").lower(),
        "migration_id": machine.migration_id,
    }
    if machine.HasField("blockage"):
        document["blockage"] = MessageToDict(machine.blockage, preserving_proto_field_name=True)
    return document


def _migration(migration: Migration) -> Document:
    return MessageToDict(migration, preserving_proto_field_name=True)
