"""The guest moved by QEMU itself: two bare processes with the same command line, and the commands a manager sends.

Promise: what QEMU is given is what suits it: all of its memory is set aside and mapped beforehand on both sides
(unless the destination is to take it meanwhile, as ours does), no limit of bandwidth, the same limit of downtime as
ours, a destination that goes on by itself. Certificates are of the same kind as ours, and checked by both sides.
Every process that was started is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from qemu.qmp import QMPClient, QMPError

from vmferry.bench.guest import Wishes
from vmferry.bench.moving import Moved, Mover, connected
from vmferry.cli.demo_hosts import TRUST_DOMAIN, Place
from vmferry.errors import MachineFailedError
from vmferry.machines.command import render_command
from vmferry.machines.paths import MachinePaths
from vmferry.machines.spec import MachineSpec
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity, Kind

MULTIFD_CHANNELS: Final = 4

_POLL_S: Final = 0.005
_PREPARE_S: Final = 120.0
_ARRIVE_S: Final = 30.0
_CANCEL_S: Final = 30.0
_END_S: Final = 10.0
# A process that has received the guest is the one to send it next, and has both roles' credentials.
_SENDS: Final = "client"
_RECEIVES: Final = "server"
_ENDPOINTS: Final = (_SENDS, _RECEIVES)
_NO_LIMIT: Final = 1 << 40
_ENDED: Final = ("completed", "failed", "cancelled")
_SERVER: Final = Identity(TRUST_DOMAIN, Kind.VMHOST, "peer")
_TLS_FILES: Final = {
    "ca-cert.pem": "ca.pem",
    "server-cert.pem": "tls.crt",
    "server-key.pem": "tls.key",
    "client-cert.pem": "tls.crt",
    "client-key.pem": "tls.key",
}


@dataclass(frozen=True)
class Variant:
    """A way in which QEMU moves a guest."""

    tls: bool = False
    channels: int = 0
    """Of multifd; 0: without."""
    compression: str = "none"

    @property
    def capabilities(self) -> list[dict[str, Any]]:
        """What both sides are told to be able to do."""
        return [{"capability": "multifd", "state": self.channels > 0}]

    def parameters(self, *, downtime_limit_ms: int, source: bool) -> dict[str, Any]:
        """What one side is told."""
        endpoint = _SENDS if source else _RECEIVES
        found: dict[str, Any] = {"tls-creds": endpoint if self.tls else ""}
        if self.channels:
            found |= {"multifd-channels": self.channels, "multifd-compression": self.compression}
        if source:
            found |= {
                "tls-hostname": _SERVER.server_name if self.tls else "",
                "downtime-limit": downtime_limit_ms,
                "max-bandwidth": _NO_LIMIT,
            }
        return found


VARIANTS: Final = {
    "qemu": Variant(),
    "qemu-tls": Variant(tls=True),
    "qemu-multifd-tls": Variant(tls=True, channels=MULTIFD_CHANNELS),
    "qemu-multifd-zstd-tls": Variant(tls=True, channels=MULTIFD_CHANNELS, compression="zstd"),
}
"""By the name that the command line knows them by."""


@dataclass
class _Process:
    """One QEMU, and what belongs to it."""

    popen: subprocess.Popen[bytes]
    paths: MachinePaths
    place: Place
    qmp: QMPClient

    async def status(self) -> dict[str, Any]:
        """How its migration stands."""
        return await _ask(self.qmp, "query-migrate")

    async def end(self) -> None:
        """End it, and remove its memory."""
        with contextlib.suppress(QMPError, EOFError, TimeoutError):
            async with asyncio.timeout(_END_S):
                await self.qmp.disconnect()
        await asyncio.to_thread(_kill, self.popen)
        self.paths.ram.unlink(missing_ok=True)


class Peer(Mover):
    """The guest of two hosts; it is on the first of them."""

    def __init__(
        self,
        wishes: Wishes,
        spec: MachineSpec,
        places: Mapping[str, Place],
        folders: tuple[Path, Path],
        downtime_limit_ms: int,
        *,
        beforehand: bool = True,
    ) -> None:
        """Prepare for it; nothing is started yet.

        Args:
            wishes: the guest.
            spec: the machine that runs it.
            places: where hosts a and b are.
            folders: for files, and for memory.
            downtime_limit_ms: the pause that QEMU is to keep to.
            beforehand: whether a destination takes all its memory before it is sent any.
        """
        super().__init__(wishes)
        self._beforehand = beforehand
        self._spec = spec
        self._places = (places["a"], places["b"])
        self._run, self._ram = folders
        self._downtime_limit_ms = downtime_limit_ms
        self._number = self._started = 0
        """The process that runs the guest, and the one that was started last."""
        self._here: _Process | None = None
        _make_certificates(self._run)

    @property
    def serials(self) -> tuple[Path, Path]:
        """Of the process that runs it, and of the one to be started next."""
        return self._paths(self._number).serial, self._paths(self._started + 1).serial

    @property
    def ram(self) -> Path:
        """The file of the process that runs it."""
        return self._paths(self._number).ram

    @property
    def pids(self) -> list[int]:
        """There is nobody else."""
        return [self.hypervisor]

    @property
    def services(self) -> list[int]:
        """None."""
        return []

    @property
    def hypervisor(self) -> int:
        """The process itself."""
        assert self._here is not None
        return self._here.popen.pid

    @property
    def socket(self) -> Path:
        """The second one; the first is for the migration."""
        return self._paths(self._number).observer

    async def get_ready(self) -> None:
        """A destination is started, with its memory, before it is sent any."""

    async def boot(self) -> None:
        """Start it on the first host."""
        await self.close()
        self._here = await self._start(self._places[0], incoming=False)
        self._number = self._started
        await self._here.qmp.execute("cont")

    async def close(self) -> None:
        """End the process."""
        if self._here is not None:
            await self._here.end()
            self._here = None

    async def move(self, variant: str, limit_s: float) -> Moved:
        """Start a destination, have the guest sent there, and end the source."""
        assert self._here is not None
        begun = time.monotonic()
        here = self._here
        place = self._places[1] if here.place is self._places[0] else self._places[0]
        there = await self._start(place, incoming=True)
        arrived = False
        try:
            address = await self._prepare(VARIANTS[variant], here, there)
            prepare_ms = round((time.monotonic() - begun) * 1000, 2)
            await here.qmp.execute("migrate", {"uri": f"tcp:{address}"})
            found = await _followed(here, limit_s)
            arrived = found["status"] == "completed" and await _runs(there)
        finally:
            if not arrived:
                await there.end()
        if not arrived:
            return Moved(_problem(found, limit_s))
        self._here, self._number = there, self._started
        await here.end()
        return Moved(
            "completed",
            prepare_ms=prepare_ms,
            total_ms=float(found["total-time"]),
            downtime_ms=float(found["downtime"]),
            sent_bytes=int(found["ram"]["transferred"]),
            rounds=int(found["ram"]["dirty-sync-count"]),
        )

    async def _prepare(self, variant: Variant, here: _Process, there: _Process) -> str:
        """Tell both sides how; the address at which the destination listens."""
        for process in (there, here):
            limits = variant.parameters(downtime_limit_ms=self._downtime_limit_ms, source=process is here)
            await process.qmp.execute("migrate-set-capabilities", {"capabilities": variant.capabilities})
            await process.qmp.execute("migrate-set-parameters", limits)
        address = there.place.data_at
        await there.qmp.execute("migrate-incoming", {"uri": f"tcp:{address}:0"})
        (found,) = (await there.status())["socket-address"]
        return f"{address}:{found['port']}"

    async def _start(self, place: Place, *, incoming: bool) -> _Process:
        """Start a process, which waits for a guest or has one that stands still."""
        self._started += 1
        paths = self._paths(self._started)
        popen = self._spawn(paths, place, incoming=incoming)
        try:
            qmp = await connected(paths.qmp)
            for endpoint in _ENDPOINTS:
                await qmp.execute("object-add", self._credentials(endpoint))
        except BaseException:
            _kill(popen)
            paths.ram.unlink(missing_ok=True)
            raise
        return _Process(popen, paths, place, qmp)

    def _credentials(self, endpoint: str) -> dict[str, Any]:
        return {
            "qom-type": "tls-creds-x509",
            "id": endpoint,
            "dir": str(self._run / endpoint),
            "endpoint": endpoint,
            "verify-peer": True,
            # It would demand that the key encrypts other keys, which elliptic-curve keys never do.
            "sanity-check": False,
        }

    def _spawn(self, paths: MachinePaths, place: Place, *, incoming: bool) -> subprocess.Popen[bytes]:
        paths.home.mkdir(mode=0o700, parents=True)
        with paths.log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - rendered from a validated spec, without a shell
                [*place.within, *self._command(paths, incoming=incoming)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _command(self, paths: MachinePaths, *, incoming: bool) -> list[str]:
        command = render_command(self._spec, paths, incoming=incoming)
        if self._beforehand or not incoming:
            command = [part.replace("prealloc=off", "prealloc=on") for part in command]
        if incoming:
            command.remove("-S")
        return command

    def _paths(self, number: int) -> MachinePaths:
        return MachinePaths.of(self._run, self._ram, name=f"q{number}", uuid=f"{self._spec.uuid}-{number}")


async def _ask(qmp: QMPClient, question: str) -> dict[str, Any]:
    return cast("dict[str, Any]", await qmp.execute(question))


async def _followed(here: _Process, limit_s: float) -> dict[str, Any]:
    """How a migration came out; it is cancelled when its time is over."""
    deadline = time.monotonic() + limit_s
    while True:
        found = await here.status()
        # A release of QEMU says completed shortly before it has worked out how long that took.
        if found["status"] in _ENDED and (found["status"] != "completed" or found.get("total-time")):
            return found
        if time.monotonic() > deadline:
            await here.qmp.execute("migrate_cancel")
            deadline = time.monotonic() + _CANCEL_S
        await asyncio.sleep(_POLL_S)


async def _runs(there: _Process) -> bool:
    """Whether the guest goes on at the destination, soon."""
    deadline = time.monotonic() + _ARRIVE_S
    while time.monotonic() < deadline and there.popen.poll() is None:
        if (await _ask(there.qmp, "query-status"))["running"]:
            return True
        await asyncio.sleep(_POLL_S)
    return False


def _problem(found: Mapping[str, Any], limit_s: float) -> str:
    if found["status"] == "cancelled":
        return f"not converged within {limit_s:.0f} s"
    if found["status"] == "completed":
        return "failed: the guest does not run at the destination"
    return f"failed: {found.get('error-desc', found['status'])}"


def _make_certificates(folder: Path) -> None:
    init_authority(folder / "authority", TRUST_DOMAIN)
    issue(folder / "authority", _SERVER, folder / "issued")
    for side in _ENDPOINTS:
        (folder / side).mkdir(mode=0o700)
        for name, made in _TLS_FILES.items():
            if name.startswith(("ca", side)):
                (folder / side / name).symlink_to(folder / "issued" / made)


def _kill(popen: subprocess.Popen[bytes]) -> None:
    """End a process and all it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)
    try:
        popen.wait(_END_S)
    except subprocess.TimeoutExpired as error:
        raise MachineFailedError(f"process {popen.pid} does not end, not even when killed") from error
