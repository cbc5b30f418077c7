"""What the page shows, and telling all who look at it when that changes.

Promise: the service is asked a few times a second while anybody looks, and not at all otherwise; whoever reads too
slowly skips what is in between; an idle stream says so every few seconds, so that a dead one is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from aiohttp import web
from google.protobuf.json_format import MessageToDict

from vmferry import __version__
from vmferry.errors import VmferryError
from vmferry.v1.machine_pb2 import Machine, MachineRight, MachineState
from vmferry.v1.migration_pb2 import Migration
from vmferry.web.view import View

_EVERY_S: Final = 0.25
_MACHINES_EVERY_S: Final = 1.0
"""Hypervisors and journals are asked less often than what is in memory."""
_ALIVE_S: Final = 10.0
_MOST_WATCHERS: Final = 32
_MOST_MIGRATIONS: Final = 200

Document = dict[str, Any]


class Feed:
    """The state of a service for those who look at its page."""

    def __init__(self, role: str, host: str, draining: bool, views: Sequence[View]) -> None:
        self._about = {"service": role, "host": host, "version": __version__, "draining": draining}
        self._views = views
        self._watchers: set[asyncio.Event] = set()
        self._wanted = asyncio.Event()
        self._ended = asyncio.Event()
        self._current = ""
        self._machines: list[Document] = []
        self._asked_machines_at = 0.0
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
        return web.Response(text=await self._document(), content_type="application/json")

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
            sent = ""
            while not self._ended.is_set():
                if self._current != sent:
                    sent = self._current
                    await response.write(f"data: {sent}\n\n".encode())
                watcher.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ALIVE_S):
                        await watcher.wait()
                        continue
                await response.write(b": nothing new\n\n")
        except ConnectionError:
            pass  # whoever watched has gone
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                self._wanted.clear()
        return response

    async def _follow(self) -> None:
        while True:
            await self._wanted.wait()
            document = await self._document()
            if document != self._current:
                self._current = document
                for watcher in self._watchers:
                    watcher.set()
            await asyncio.sleep(_EVERY_S)

    async def _document(self) -> str:
        async with self._asking:
            if time.monotonic() - self._asked_machines_at > _MACHINES_EVERY_S or not self._asked_machines_at:
                self._machines = [_machine(one) for view in self._views for one in await _machines_of(view)]
                self._asked_machines_at = time.monotonic()
        migrations = [
            _migration(one) for view in self._views for one in await view.migrations(limit=_MOST_MIGRATIONS)
        ]
        arrivals = [dataclasses.asdict(one) for view in self._views for one in view.arrivals()]
        return json.dumps(
            self._about | {"machines": self._machines, "migrations": migrations, "arrivals": arrivals},
            separators=(",", ":"),
        )


async def _machines_of(view: View) -> Sequence[Machine]:
    try:
        return await view.machines()
    except (
        VmferryError,
        OSError,
    ):  # a machine that ends while it is looked at; the next look is a moment away
        return []


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
