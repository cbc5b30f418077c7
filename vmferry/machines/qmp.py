"""The machine that speaks QMP: the micro-VM and QEMU, with the same commands.

Promise: what :class:`vmferry.machines.port.Machine` says, and beyond it: ``cont`` is sent only for a permit
made out for this very machine; device state that was saved is what the hypervisor says it completed; one
operation runs at a time, so that no ``cont`` slips between the commands of a save or a load.

A hypervisor may serve a single client at a time (QEMU does). ``close`` frees its socket for others, and the
next call connects again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from vmferry.errors import (
    InvalidArgumentError,
    MachineDeadError,
    MachineFailedError,
    MachineNotOwnedError,
    TrackerUnavailableError,
    WrongPhaseError,
)
from vmferry.handoff.gate import ResumePermit
from vmferry.machines.inspection import Inspection, inspect
from vmferry.machines.loading import Loading
from vmferry.machines.migrating import MigrationControl, StreamProgress
from vmferry.machines.monitor import Monitor
from vmferry.machines.paths import MachinePaths
from vmferry.machines.port import Machine, RunState, VcpuTimes
from vmferry.machines.process import ProcessIdentity
from vmferry.machines.qemu.spec import IMAGE_FORMATS
from vmferry.machines.spec import QEMU, MachineSpec
from vmferry.machines.state_socket import MAX_STATE_BYTES, StateTooLargeError, receiving
from vmferry.memory import memfd
from vmferry.memory.backings import MEMFD
from vmferry.memory.regions import Region

DEFAULT_QMP_TIMEOUT_S: Final = 10.0
MAX_SERIAL_BYTES: Final = 4096
"""What one call may type; the ring buffers of hypervisors start at this size."""

_STATUS: Final = "query-status"
_POLL_S: Final = 0.001
_WATCH_S: Final = 0.05
_MIB: Final = 1024 * 1024

_RUN_STATES: Final = {
    "running": RunState.RUNNING,
    # The guest sleeps, and a device may wake it at any moment without anybody's leave.
    "suspended": RunState.RUNNING,
    "paused": RunState.PAUSED,
    "debug": RunState.PAUSED,
    "save-vm": RunState.PAUSED,
    "restore-vm": RunState.PAUSED,
    "finish-migrate": RunState.PAUSED,
    "prelaunch": RunState.PRELAUNCH,
    "inmigrate": RunState.INMIGRATE,
    "postmigrate": RunState.POSTMIGRATE,
    "shutdown": RunState.SHUTDOWN,
    "internal-error": RunState.FAILED,
    "io-error": RunState.FAILED,
    "guest-panicked": RunState.FAILED,
    "watchdog": RunState.FAILED,
}
_ABOUT_CLOCKS: Final = frozenset({"query-chardev", "rtc-reset-reinjection", "x-keep-clock", "x-query-clock"})
_STOPPED: Final = frozenset({RunState.PAUSED, RunState.PRELAUNCH, RunState.POSTMIGRATE})
# How often and how fast the guest's addresses are announced; QEMU's own defaults after a migration.
_ANNOUNCE: Final = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


class QmpMachine(Machine):
    """A machine driven over its QMP socket. Nothing is connected until the first call."""

    def __init__(
        self,
        spec: MachineSpec,
        paths: MachinePaths,
        process: ProcessIdentity,
        *,
        qmp_timeout_s: float = DEFAULT_QMP_TIMEOUT_S,
        observe: bool = False,
    ) -> None:
        self._spec = spec
        self._timeout_s = qmp_timeout_s
        # The micro-VM serves any number of clients at its one socket.
        address = paths.observer if observe and spec.kind == QEMU else paths.qmp
        self._monitor = Monitor(spec, paths, process, address, qmp_timeout_s=qmp_timeout_s)
        self._lock = asyncio.Lock()
        self._migration = MigrationControl(
            self._monitor,
            self._failure,
            qemu=spec.kind == QEMU,
            disks=spec.qemu is not None and bool(spec.qemu.disks),
            timeout_s=qmp_timeout_s,
        )
        self._loading = Loading(
            self._migration, paths, self._run_state, self._failure, timeout_s=qmp_timeout_s
        )
        self._loaded: bytes | None = None
        """What a machine that stands still was loaded with; kept until it runs."""
        self._loaded_at = 0.0
        self._stands = False
        """It was just seen to stand still, by a command that was given here."""
        self.paths = paths
        self.process = process

    @property
    def spec(self) -> MachineSpec:
        """What the machine is made of."""
        return self._spec

    @property
    def pid(self) -> int:
        """The process in whose address space the guest's memory lies."""
        return self.process.pid

    @property
    def ram(self) -> Region:
        """The guest's memory.

        Raises:
            TrackerUnavailableError: it cannot be reached from outside of the machine's process.
        """
        path = self.paths.ram
        if self._spec.memory_backing == MEMFD:
            path = memfd.find(self.pid, self._spec.uuid)
        elif not self._spec.shared_memory:
            raise TrackerUnavailableError(
                f"the memory of {self._spec.name} is private to process {self.pid}",
                remedy="Describe the machine with another memory_backing.",
                pid=self.pid,
            )
        return Region(name="ram", path=path, size_bytes=self._spec.memory_bytes)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the process, which was just started, takes commands."""
        async with self._lock:
            await self._monitor.wait_ready(timeout_s)

    async def run_state(self) -> RunState:
        """What the vCPUs are doing."""
        return (await self.status())[0]

    async def status(self) -> tuple[RunState, str]:
        """What the vCPUs are doing, and the hypervisor's own word for it."""
        async with self._lock:
            return await self._status()

    async def stop(self) -> None:
        """Pause the guest. The hypervisor answers once the vCPUs stand; its state is asked to be sure."""
        async with self._lock:
            if await self._run_state_after("stop") is RunState.RUNNING:
                raise self._failure("stop", "the guest still runs, or is asleep and cannot be held still")
            self._stands = True

    async def cont(self, permit: ResumePermit) -> None:
        """Let the guest run, with a permit for this machine."""
        if permit.machine_id != self._spec.uuid:
            raise MachineNotOwnedError(
                f"machine {self._spec.uuid} cannot be resumed with a permit for {permit.machine_id}",
                machine=self._spec.uuid,
                permit=permit.machine_id,
            )
        async with self._lock:
            self._stands = False
            if self._loaded is None:  # a machine that was loaded here stands still, and waits for nothing
                state = await self._run_state()
                if state is RunState.RUNNING:
                    # A stream that was begun with the guest running is of no use to anybody any more.
                    await self._migration.end()
                    return
                # A machine that waits for device state must not get as far as the hypervisor: QEMU would note the
                # wish and start the guest by itself as soon as the state has come.
                self._require(state, _STOPPED, "be resumed")
                # QEMU does not go on in the middle of a save, maybe one that another process had begun.
                await self._migration.end()
            self._loaded = None
            if await self._run_state_after("cont") in _STOPPED:
                raise self._failure("cont", "the guest still does not run")

    async def get_ready(self) -> None:
        """Do beforehand what saving and loading need, so that the guest's pause is shorter."""
        async with self._lock:
            await self._migration.end()
            await self._migration.prepare_device_state()

    async def get_ready_to_load(self) -> asyncio.Task[None] | None:
        """The same, and have a QEMU that waits for device state listen for it: loading is sending then.

        Returns what ends when it is quite ready; None for a micro-VM, which does not wait for long.
        """
        await self.get_ready()
        async with self._lock:
            return await self._loading.open(self.pid) if self._spec.kind == QEMU else None

    async def check_images(self) -> None:
        """Refuse a hypervisor that opened other images than its description names.

        A header may name more of them, and whoever writes to an image may have changed it since it was looked at.
        """
        disks = self._spec.qemu.disks if self._spec.qemu is not None else ()
        if not disks:
            return
        async with self._lock:
            nodes = await self._monitor.execute("query-named-block-nodes", {"flat": True}, repeatable=True)
        named = {("file", disk.path) for disk in disks}
        opened = {(str(node["drv"]), str(node["file"])) for node in nodes if node["drv"] not in IMAGE_FORMATS}
        if opened - named:
            words = ", ".join(f"{driver}:{file}" for driver, file in sorted(opened - named))
            raise self._failure("query-named-block-nodes", f"it has opened what no disk names: {words}")

    async def save_device_state(self, *, all_come: Callable[[], None] = lambda: None) -> bytes:
        """Everything of the paused machine that is not RAM, asked for anew by each call.

        Args:
            all_come: called when the hypervisor has hung up, before it is asked whether that was all: whatever
                else, its devices are not being saved any more.
        """
        async with self._lock:
            stands, self._stands = self._stands, False
            if not stands:  # the guest waits: what was just seen is not asked again
                self._require(await self._run_state(), _STOPPED, "be saved")
            return await self._save(all_come)

    async def load_device_state(self, data: bytes) -> None:
        """Give a machine that waits for it the device state; the same bytes again change nothing."""
        async with self._lock:
            # One that waits at a connection was seen to wait, and does so until it is sent something, or dies.
            if not (self._loading.waits and self.process.alive()):
                state = await self._run_state()
                if state in _STOPPED and data == self._loaded:
                    return
                self._require(state, frozenset({RunState.INMIGRATE}), "take device state")
            await self._loading.load(data)
            self._loaded, self._loaded_at = data, time.monotonic()

    def just_loaded(self, within_s: float) -> bool:
        """Whether it was loaded by this hold so short a time ago, was not told to run since, and lives."""
        recent = self._loaded is not None and time.monotonic() - self._loaded_at < within_s
        return recent and self.process.alive()

    async def get_ready_to_stream(self, *, slow_down: bool = False) -> None:
        """Do beforehand what the hypervisor's own migration stream needs."""
        async with self._lock:
            await self._migration.end()
            await self._migration.prepare_stream(slow_down=slow_down)

    async def slow_down(self, percent: int) -> None:
        """Let the hypervisor hold its guest back so far, while it streams; it stops doing so when the stream ends."""
        async with self._lock:
            await self._migration.slow_down(percent)

    async def begin_stream(self, path: Path) -> None:
        """Have the hypervisor, which was got ready for it, stream memory and all to the socket at ``path``."""
        async with self._lock:
            await self._migration.send(path)

    async def stream_progress(self) -> StreamProgress:
        """How that stream stands; raises the hypervisor's words if it failed."""
        async with self._lock:
            return await self._migration.progress()

    async def finish_stream(self) -> None:
        """Have the rest sent, once the hypervisor has paused for that."""
        async with self._lock:
            await self._migration.go_on()

    async def wait_stream_completed(self) -> None:
        """Wait until the hypervisor says that all was sent, and has settled down with its guest paused."""
        async with self._lock:
            while True:
                completed = await self._migration.completed("migrate")
                if completed and await self._run_state() is RunState.POSTMIGRATE:
                    return
                await asyncio.sleep(_POLL_S)

    async def end_stream(self) -> None:
        """End a stream that is not wanted any more; returns when it has ended."""
        async with self._lock:
            await self._migration.end()

    async def receive_stream(self, path: Path) -> None:
        """Have a waiting hypervisor listen at ``path`` for such a stream."""
        async with self._lock:
            self._require(await self._run_state(), frozenset({RunState.INMIGRATE}), "take in a stream")
            await self._migration.prepare_incoming_stream()
            await self._migration.receive(path)

    async def wait_stream_loaded(self) -> None:
        """Wait until the hypervisor has loaded a stream that it was given to its end, and is paused."""
        async with self._lock:
            await self._loading.end_of_stream()
            self._loaded, self._loaded_at = b"", time.monotonic()

    def stream_refused(self) -> MachineFailedError:
        """What to say of a hypervisor that hung up on its stream."""
        return self._loading.refused()

    async def announce(self) -> None:
        """Tell the network where the machine is now."""
        async with self._lock:
            await self._monitor.execute("announce-self", _ANNOUNCE, repeatable=True)

    async def send_serial(self, text: str) -> None:
        """Type ``text`` at the machine's serial port."""
        if len(text.encode()) > MAX_SERIAL_BYTES:
            raise InvalidArgumentError(
                f"the text is longer than {MAX_SERIAL_BYTES} bytes", field="text", remedy="Send it in parts."
            )
        async with self._lock:
            await self._monitor.execute("ringbuf-write", {"device": "serial0", "data": text})

    async def vcpu_times(self) -> VcpuTimes | None:
        """When the vCPUs stopped and started; ``None`` if the hypervisor does not know the question."""
        async with self._lock:
            try:
                answer = await self._monitor.execute("x-query-vcpu-times", repeatable=True)
            except MachineFailedError as error:
                if error.metadata.get("error_class") == "CommandNotFound":
                    return None
                raise
        try:
            stop, start = answer["last-stop-monotonic-ns"], answer["last-start-monotonic-ns"]
            return VcpuTimes(
                boot_id=str(answer["boot-id"]),
                last_stop_monotonic_ns=None if stop is None else int(stop),
                last_start_monotonic_ns=None if start is None else int(start),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._failure("x-query-vcpu-times", f"an answer without sense: {answer!r}") from error

    async def version(self) -> str:
        """What runs the machine, and in which release."""
        async with self._lock:
            answer = await self._monitor.execute("query-version", repeatable=True)
        try:
            numbers = answer["qemu"]
            return f"{answer['package']} {numbers['major']}.{numbers['minor']}.{numbers['micro']}".strip()
        except (KeyError, TypeError) as error:
            raise self._failure("query-version", f"an answer without sense: {answer!r}") from error

    async def ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Send a command about the guest's clock or its agent, and return its answer.

        Only these: what lets a guest run goes through :meth:`cont`, with its permit. Each may be sent twice with the
        effect of once.
        """
        if command not in _ABOUT_CLOCKS:
            raise ValueError(f"{command} is not about a guest's clock")
        async with self._lock:
            return await self._monitor.execute(command, arguments, repeatable=True)

    async def inspect(self) -> Inspection:
        """What QEMU says of its release, its parts, and what forbids a migration."""
        async with self._lock:
            return await inspect(self._monitor, self._migration.needed)

    async def alive(self) -> bool:
        """Whether the machine's process runs."""
        return self.process.alive()

    async def quit(self) -> None:
        """Ask the machine's process to end; its memory is lost."""
        async with self._lock:
            try:
                await self._monitor.execute("quit", repeatable=True)
            except MachineDeadError:
                return
            finally:
                await self._monitor.close()

    async def close(self) -> None:
        """Let go of the machine, which lives on."""
        async with self._lock:
            await self._loading.close()
            await self._monitor.close()

    async def _run_state(self) -> RunState:
        return (await self._status())[0]

    async def _run_state_after(self, command: str) -> RunState:
        """What the vCPUs are doing when the hypervisor is through with a command that may be given twice."""
        return self._understood(await self._monitor.execute(command, repeatable=True, then=_STATUS))[0]

    async def _status(self) -> tuple[RunState, str]:
        return self._understood(await self._monitor.execute(_STATUS, repeatable=True))

    def _understood(self, answer: Any) -> tuple[RunState, str]:
        word = answer.get("status") if isinstance(answer, dict) else None
        state = _RUN_STATES.get(str(word))
        if state is None:
            raise self._failure(_STATUS, f"the hypervisor names a state that is not known here: {word!r}")
        return state, str(word)

    async def _save(self, all_come: Callable[[], None]) -> bytes:
        await self._migration.prepare_device_state()
        async with receiving(self.paths.state_socket) as received:
            await self._migration.send(self.paths.state_socket)
            await self._until_completed(received, all_come)
            try:
                data = received.result()
            except StateTooLargeError as error:
                raise self._failure(
                    "migrate", f"more than {MAX_STATE_BYTES} bytes of device state"
                ) from error
        if not data:
            raise self._failure("migrate", "the hypervisor sent no device state")
        return data

    async def _until_completed(self, received: asyncio.Task[bytes], all_come: Callable[[], None]) -> None:
        """Wait until the hypervisor says that all is sent, and all has come."""
        hung_up = False
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    await asyncio.wait((received,), timeout=_WATCH_S)
                    if received.done() and received.exception() is not None:
                        return
                    if received.done() and not hung_up:
                        hung_up = True
                        all_come()
                    if await self._migration.completed("migrate") and received.done():
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise self._failure("migrate", f"not completed within {self._timeout_s:g} s") from error

    def _require(self, state: RunState, wanted: frozenset[RunState], verb: str) -> None:
        if state not in wanted:
            raise WrongPhaseError(
                f"machine {self._spec.name} cannot {verb} while it is {state}",
                machine=self._spec.uuid,
                state=state,
            )

    def _failure(self, command: str, words: str) -> MachineFailedError:
        return MachineFailedError(
            f"machine {self._spec.name}: {command} failed: {words}", machine=self._spec.uuid, command=command
        )
