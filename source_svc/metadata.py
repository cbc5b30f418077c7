"""The metadata service: answers what guests ask of ``/metadata``, each about itself.

Promise: whose machine it is follows from the socket on which a request arrives, and from nothing in the request;
every answer comes at once; a listener that cannot be made is named in the log and keeps nobody from working.

Each machine is served in up to three ways: through its own hardware (``guest_link``), on a unix socket in the host's
``guests_dir`` for whatever the operator puts between it and the guest, and where ``metadata_listen`` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final

from aiohttp import HttpVersion11, web
from aiohttp.web_request import BaseRequest

from source_svc.announcing import Announcements
from source_svc.guest_link import GuestLink
from source_svc.neighbours import EventsService, Neighbours
from source_svc.residents import LOOK_S, Residents
from vmferry.errors import ConfigError
from vmferry.events import policy, protocol
from vmferry.machines.directory import MachineRecord
from vmferry.machines.paths import MAX_SOCKET_PATH_BYTES
from vmferry.machines.spec import MachineSpec
from vmferry.rpc.daemon import Host
from vmferry.telemetry.logs import get_logger

_LOG: Final = get_logger(__name__)
_LISTEN: Final = re.compile(
    r"(?P<name>[a-z][a-z0-9-]*)=(?P<address>\[[0-9a-fA-F:.]+\]|[0-9.]+):(?P<port>[0-9]{1,5})(%(?P<interface>[^\s%/]{1,15}))?"
)
_MAX_PORT: Final = 65535
_KEEP_ALIVE_S: Final = 75.0
_BACKLOG: Final = 100
_NEW_SOCKET: Final = ".new"
"""No longer than any socket's own name; only one at a time is made."""
_SILENT: Final = logging.getLogger(f"{__name__}.http")
"""For what aiohttp has to say of requests that are no HTTP: a guest must not fill its host's log."""
_SILENT.setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True)
class Listen:
    """One entry of ``metadata_listen``."""

    machine: str
    address: str
    port: int
    interface: str = ""

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Read NAME=ADDRESS:PORT or NAME=ADDRESS:PORT%INTERFACE.

        Raises:
            ConfigError: it is neither.
        """
        match = _LISTEN.fullmatch(text)
        if match is None or not 0 < int(match["port"]) <= _MAX_PORT:
            raise ConfigError(
                f"{text!r} is not NAME=ADDRESS:PORT or NAME=ADDRESS:PORT%INTERFACE", field="metadata_listen"
            )
        return cls(match["name"], match["address"].strip("[]"), int(match["port"]), match["interface"] or "")


@dataclass
class _Served:
    """One machine that is being served."""

    record: MachineRecord
    server: web.Server
    due: list[Path | Listen]
    """Where it is to be listened for it, and is not yet."""
    link: GuestLink | None = None
    servers: list[asyncio.Server] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    """What stands in the way, as far as the log has it."""


class MetadataService:
    """The metadata service of one host."""

    def __init__(self, host: Host, *, is_busy: Callable[[str], bool]) -> None:
        self.announcements = Announcements(host.config, is_busy=is_busy)
        self._config = host.config
        self._ledger = host.ledger
        self._listens = [Listen.parse(text) for text in host.config.metadata_listen]
        self._residents = Residents(
            host.directory, between=lambda machine_id: host.ledger.rights(machine_id).being_updated
        )
        self._served: dict[str, _Served] = {}
        self._limits: dict[str, policy.RateLimit] = {}
        self._task: asyncio.Task[None] | None = None
        self._neighbours = Neighbours(host, self._present)
        self.announcements.distant = self._neighbours.boards
        self.events = EventsService(self._present, self.announcements)

    async def start(self) -> None:
        """Serve the machines that are here, and those that come."""
        self._look()
        await self._neighbours.start()
        await self._follow()
        self._task = asyncio.create_task(self._keep(), name="metadata")

    async def close(self) -> None:
        """Serve nobody any more; safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._neighbours.close()
        for machine_id in list(self._served):
            await self._leave(machine_id)

    async def answer(self, spec: MachineSpec, request: protocol.Request) -> protocol.Response:
        """Answer one request of a machine."""
        limit = self._limits.setdefault(spec.uuid, policy.RateLimit(self._config.metadata_requests_per_s))
        if not limit.admits(time.monotonic()):
            return protocol.too_many()
        if protocol.asks_for_events(request):
            self.announcements.asked(spec.uuid)
        found = protocol.answer(request, self.announcements.view(spec))
        if found.approves:
            self.announcements.approve(spec, found.approves)
            self._neighbours.approve(spec, found.approves)
        return found.response

    # Who is served

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._follow()
            except OSError as error:
                _LOG.error("the machines of this host cannot be looked at", detail=str(error))

    def _present(self) -> Sequence[MachineSpec]:
        return self.announcements.residents

    def _look(self) -> bool:
        """Look who is here; whether that has changed."""
        changed = self._residents.look()
        if changed:
            self.announcements.residents = [record.spec for record in self._residents.records.values()]
            self._neighbours.hurry()
        return changed

    async def _follow(self) -> None:
        records = self._residents.records
        if self._look() or records.keys() != self._served.keys():
            records = self._residents.records
            for machine_id, served in list(self._served.items()):
                now = records.get(machine_id)
                if now is None or _guest(now.spec) != _guest(served.record.spec):
                    await self._leave(machine_id)
                elif now.process != served.record.process:
                    await self._go_on(served, now)
            for machine_id in records.keys() - self._served.keys():
                self._served[machine_id] = self._begin(records[machine_id])
        for machine_id, served in self._served.items():
            # One that is still arriving is another host's to speak for; its guest cannot ask yet.
            if served.due and (await asyncio.to_thread(self._ledger.rights, machine_id)).permitted:
                await self._listen(served)

    def _begin(self, record: MachineRecord) -> _Served:
        spec = record.spec
        due: list[Path | Listen] = [(self._config.guests_dir / f"{spec.name}.sock").absolute()]
        due += [listen for listen in self._listens if listen.machine == spec.name]
        return _Served(record, self._server(spec, close=False), due, self._link(record))

    def _link(self, record: MachineRecord) -> GuestLink | None:
        if not record.spec.metadata:
            return None
        return GuestLink(record.paths.metadata_socket, self._server(record.spec, close=True))

    async def _go_on(self, served: _Served, record: MachineRecord) -> None:
        """Its guest goes on in another process: what does not lead through its hardware is not cut off."""
        if served.link is not None:
            await served.link.close()
        served.record = record
        served.link = self._link(record)

    async def _listen(self, served: _Served) -> None:
        for where in list(served.due):
            try:
                with contextlib.ExitStack() as undo:
                    one = undo.enter_context(contextlib.closing(listening(where)))
                    served.servers.append(
                        await asyncio.get_running_loop().create_server(served.server, sock=one)
                    )
                    undo.pop_all()
                served.due.remove(where)
            except OSError as error:  # tried again at the next look
                if str(error) not in served.said:
                    name = served.record.spec.name
                    _LOG.error(
                        "the metadata service cannot listen",
                        machine=name,
                        where=str(where),
                        detail=str(error),
                    )
                served.said.add(str(error))

    async def _leave(self, machine_id: str) -> None:
        served = self._served.pop(machine_id)
        self._limits.pop(machine_id, None)
        (self._config.guests_dir / f"{served.record.spec.name}.sock").unlink(missing_ok=True)
        if served.link is not None:
            await served.link.close()
        for server in served.servers:
            server.close()
        await served.server.shutdown(0)

    def _server(self, spec: MachineSpec, *, close: bool) -> web.Server:
        async def handle(request: BaseRequest) -> web.StreamResponse:
            try:
                said = await self.answer(spec, await _asked(request))
            except Exception:
                _LOG.exception("a request to the metadata service failed", machine=spec.uuid)
                raise
            response = web.Response(status=said.status, body=said.body, headers=dict(said.headers))
            response.headers["Server"] = "vmferry"
            if said.status != HTTPStatus.NOT_MODIFIED:  # which has no body to have a type
                response.headers["Content-Type"] = said.content_type
            if close:
                response.force_close()
            return response

        return web.Server(handle, keepalive_timeout=_KEEP_ALIVE_S, access_log=None, logger=_SILENT)


def _guest(spec: MachineSpec) -> tuple[str, str, str, bool]:
    """What the metadata service knows a guest by; an update in place changes none of it."""
    return spec.name, spec.called, spec.availability_set, spec.metadata


def listening(where: Path | Listen) -> socket.socket:
    """A socket that listens; a file can be connected to from the moment it is there, by its owner alone."""
    if isinstance(where, Path):
        return _listening_at(where)
    one = socket.socket(socket.AF_INET6 if ":" in where.address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if where.interface:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, where.interface.encode() + b"\0")
        one.bind((where.address, where.port))
        one.listen(_BACKLOG)
    except BaseException:
        one.close()
        raise
    return one


def _listening_at(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise OSError(f"{path} is too long for a socket")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Between bind and listen whoever connects is refused, so nobody may know its name yet.
    made = path.with_name(_NEW_SOCKET)
    made.unlink(missing_ok=True)
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        one.bind(str(made))
        one.listen(_BACKLOG)
        made.replace(path)
    except BaseException:
        one.close()
        raise
    return one


async def _asked(request: BaseRequest) -> protocol.Request:
    """What a request says, its body included: what were left of it would be taken for the next one."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    body = bytearray()
    while chunk := await request.content.readany():
        if len(body) <= protocol.MAX_BODY_BYTES:
            body += chunk
    return protocol.Request(
        method=request.method,
        path=request.path,
        query=list(request.query.items()),
        headers={name.lower(): value for name, value in request.headers.items()},
        body=bytes(body),
    )
