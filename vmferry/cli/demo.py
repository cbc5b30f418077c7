"""``vmferry demo``: a running guest moves between two real hosts on this computer, and says how it was.

Promise: nothing is pretended. The services, certificates, connections, the guest and the figures are the real ones;
everything that was started is ended and removed, also on failure and on a signal.
"""

from __future__ import annotations

import asyncio
import enum
import shutil
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from vmferry.cli.bounds import Bounds
from vmferry.cli.clocks import clock_words
from vmferry.cli.connection import open_source
from vmferry.cli.demo_guest import Canary, Guest, Linux
from vmferry.cli.demo_hosts import Shore, TwoHosts, require_memory, show_logs, two_hosts
from vmferry.cli.demo_report import Crossing, Report
from vmferry.cli.demo_update import demonstrate
from vmferry.cli.demo_work import next_sign, watch_before
from vmferry.cli.machine import run_machine
from vmferry.cli.migrate import LanesOption, PathOption, Verify, Way, migration_options
from vmferry.cli.output import JsonOption, console, print_document, say, size
from vmferry.cli.progress import outcome_name, progress_view
from vmferry.cli.watch import follow
from vmferry.client.places import Target
from vmferry.errors import InvalidArgumentError
from vmferry.machines.qemu import probe
from vmferry.machines.qemu.guest import append, archive, initramfs, newest_kernel
from vmferry.machines.qemu.guest.agent import agent_entries, agent_modules
from vmferry.machines.qemu.spec import NicSpec, QemuSpec
from vmferry.machines.spec import MAX_VCPUS, MICROVM, QEMU, new_mac, new_qemu_spec, new_spec
from vmferry.telemetry.spans import load_spans
from vmferry.telemetry.timeline import render_timeline
from vmferry.telemetry.tracing import configure, phase

MIN_STAY_S: Final = 1.0
"""How long the guest runs where it arrived before it is asked how it is."""
DEFAULT_WORKING_SET_MIB: Final = 16
"""Small enough to be sent within the default downtime limit by a slow computer that is both hosts."""
PROGRAM_MIB: Final = 1
"""What the guest's own program takes."""
LINUX_MIB: Final = 96
"""What a Linux kernel takes to boot and run, with its initial file system."""
LINUX_SHARE: Final = 8
"""Unless told otherwise, a Linux guest fills one part in so many: QEMU without KVM takes its time to check it."""
STREAM_MS_PER_MIB: Final = 50
"""What a streamed crossing may pause the guest, for each MiB of its memory; far longer than it takes."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIGNALLED: Final = 128
"""Added to a signal's number: the exit code by which shells tell it."""
_MIB: Final = 1024 * 1024

Result = TypeVar("Result")


@dataclass(frozen=True)
class Wishes:
    """What the demonstration was asked for."""

    memory_mib: int
    resident_mib: int
    dirty_mib_per_s: int
    working_set_mib: int
    lanes: int | None
    repeat: int
    keep: Path | None
    kind: str
    vcpus: int
    kernel: Path | None
    path: Way | None
    update: bool = False

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            InvalidArgumentError: the guest cannot have what is asked for.
            InsufficientMemoryError: this computer cannot.
            MachineFailedError: there is no QEMU that can be asked.
        """
        used_mib = self.resident_mib + (
            PROGRAM_MIB + (self.working_set_mib if self.dirty_mib_per_s else 0)
            if self.kind == MICROVM
            else LINUX_MIB
        )
        if not 1 <= self.vcpus <= MAX_VCPUS[self.kind]:
            raise InvalidArgumentError(
                f"a machine of kind {self.kind} has 1 to {MAX_VCPUS[self.kind]} vcpus", field="--vcpus"
            )
        if used_mib > self.memory_mib:
            raise InvalidArgumentError(
                f"the guest has {self.memory_mib} MiB, and its program, what it fills and what it writes to "
                f"would be {used_mib}",
                field="--resident-mib",
                remedy="Choose less of --resident-mib or --working-set-mib, or more of --memory-mib.",
            )
        if self.path is Way.STREAM and self.kind != QEMU:
            raise InvalidArgumentError("only QEMU has a stream of its own", field="--path")
        # An update copies nothing: there is one memory file, of which a guest takes what it fills.
        require_memory(0 if self.update else self.memory_mib * _MIB, used_mib * _MIB)
        if self.kind == QEMU:
            probe.probe_binary(QemuSpec.binary)
            initramfs()
            self._check_kernel()

    def _check_kernel(self) -> None:
        kernel = self.kernel or newest_kernel()
        try:
            with kernel.open("rb"):
                pass
        except OSError as error:
            raise InvalidArgumentError(f"cannot read {kernel}: {error.strerror}", field="--kernel") from error


class Kind(enum.StrEnum):
    """What can be demonstrated."""

    MICROVM = MICROVM
    QEMU = QEMU


def demo(
    *,
    machine: Annotated[Kind, typer.Option("--machine", help="What runs the guest.")] = Kind.MICROVM,
    memory_mib: Annotated[int, typer.Option("--memory-mib", min=4, help="Guest memory.")] = 256,
    resident_mib: Annotated[
        int | None,
        typer.Option(
            "--resident-mib", min=1, help="How much the guest fills; default: half, in QEMU an eighth."
        ),
    ] = None,
    dirty_mib_per_s: Annotated[
        int, typer.Option("--dirty-mib-per-s", min=0, help="How fast the guest writes.")
    ] = 0,
    working_set_mib: Annotated[
        int, typer.Option("--working-set-mib", min=1, help="How much memory it writes to again and again.")
    ] = DEFAULT_WORKING_SET_MIB,
    lanes: LanesOption = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Measured crossings, there and back.")] = 1,
    vcpus: Annotated[int, typer.Option("--vcpus", min=1, help="Processors, in QEMU.")] = 1,
    kernel: Annotated[
        Path | None,
        typer.Option("--kernel", metavar="PATH", help="Linux kernel for QEMU; default: the newest in /boot."),
    ] = None,
    path: PathOption = None,
    update: Annotated[
        bool, typer.Option("--update", help="Replace the hypervisor process beneath the guest instead.")
    ] = False,
    qemu_binary: Annotated[
        str, typer.Option("--qemu-binary", metavar="PATH", help="With --update: the QEMU that takes over.")
    ] = "",
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep logs, traces and journals here.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Move a running guest between two hosts on this computer, and show what happened."""
    share = 2 if machine is Kind.MICROVM else LINUX_SHARE
    wishes = Wishes(
        memory_mib=memory_mib,
        resident_mib=memory_mib // share if resident_mib is None else resident_mib,
        dirty_mib_per_s=dirty_mib_per_s,
        working_set_mib=working_set_mib,
        lanes=lanes,
        repeat=repeat,
        keep=keep,
        kind=machine.value,
        vcpus=vcpus,
        kernel=kernel,
        path=path,
        update=update,
    )
    wishes.check()
    if update:
        _demo_update(wishes, qemu_binary, json=json)
    report = asyncio.run(until_signalled(_demonstrate(wishes, _nothing if json else print)))
    if json:
        print_document(report.document())
    else:
        _print_end(report)
    raise typer.Exit(report.exit_code)


def _demo_update(wishes: Wishes, qemu_binary: str, *, json: bool) -> None:
    tell = _nothing if json else print
    work = demonstrate(wishes.keep, lambda world: _guest(world, wishes), qemu_binary, wishes.repeat, tell)
    found = asyncio.run(until_signalled(work))
    if json:
        print_document(found.document())
    else:
        tell(f"\nthe guest is well: {_yes(found.guest_ok)}")
    raise typer.Exit(found.exit_code)


async def _demonstrate(wishes: Wishes, tell: Callable[[str], None]) -> Report:
    async with two_hosts(wishes.keep) as world:
        tell("vmferry demo: a running guest crosses from host a to host b and back.\n")
        tell("  services  source and destination of both hosts are up, on loopback with mutual TLS")
        write_out = configure("scheduler", world.trace_dir, host="operator")
        try:
            report = await _voyage(world, wishes, tell)
        finally:
            write_out()
        report.peak_rss_mib = {service.name: service.peak_rss_mib() for service in world.services}
        if report.broken is not None:
            show_logs(world)
        await world.stop_services()  # which write out the spans they still hold
        trace_id = report.crossings[0].migration.trace_id
        if trace_id:  # it is empty where the environment switched tracing off
            report.spans = load_spans([world.trace_dir], trace_id)
        return report


async def _voyage(world: TwoHosts, wishes: Wishes, tell: Callable[[str], None]) -> Report:
    guest = _guest(world, wishes)
    spec, report = guest.spec, Report(guest.spec.name, wishes.memory_mib * _MIB)
    await run_machine(spec, world.a.host.config)
    await guest.wait_ready(world.a.host)
    tell(f"  started   {spec.name} on host a: {wishes.memory_mib} MiB, {wishes.resident_mib} of them filled")

    here, there = world.a, world.b
    for _ in range(wishes.repeat):
        if not await _cross(world, here, there, guest, report, wishes, Verify.DIGEST, tell):
            return report
        here, there = there, here
    await asyncio.sleep(MIN_STAY_S)
    whole, sentence = await guest.check_everything(here.host)
    tell(f"  on {here.host.name}      {sentence}")

    if await _cross(world, here, there, guest, report, wishes, Verify.BYTES, tell):
        report.guest_ok = whole and await guest.well(there.host)
    return report


def _guest(world: TwoHosts, wishes: Wishes) -> Guest:
    if wishes.kind == MICROVM:
        spec = new_spec("canary", wishes.memory_mib, "canary", _params(wishes))
        return Canary(spec, wishes.resident_mib)
    kernel, initrd = world.images / "vmlinuz", world.images / "initrd"
    shutil.copyfile(wishes.kernel or newest_kernel(), kernel)
    files, agent = _file_system(wishes.kernel or newest_kernel())
    initrd.write_bytes(files)
    part = QemuSpec(
        kernel=str(kernel),
        initrd=str(initrd),
        append=append(wishes.resident_mib, wishes.dirty_mib_per_s),
        nics=(NicSpec(backend="user", mac=new_mac()),),
        agent=agent,
    )
    return Linux(new_qemu_spec("linux", wishes.memory_mib, wishes.vcpus, part), wishes.resident_mib)


def _file_system(kernel: Path) -> tuple[bytes, bool]:
    """The guest's, with an agent if this computer has one to give; whether it has."""
    try:
        return initramfs(modules=agent_modules(kernel)) + archive(agent_entries()), True
    except InvalidArgumentError:
        return initramfs(), False


async def _cross(
    world: TwoHosts,
    here: Shore,
    there: Shore,
    guest: Guest,
    report: Report,
    wishes: Wishes,
    verify: Verify,
    tell: Callable[[str], None],
) -> bool:
    """Move the guest once and note how it went; whether it arrived."""
    # A stream cannot be compared byte for byte, so the crossing that compares is left to take the direct way.
    way = wishes.path if verify is Verify.DIGEST else None
    options = migration_options(Bounds(_pause_ms(wishes, way)), wishes.lanes, verify, None, way)
    target = Target(there.host.identity.uri, there.dest.address)
    watched = await watch_before(guest, here.host)
    async with open_source(here.source.address, here.host.identity.uri, world.admin_tls) as source:
        with phase("schedule"), progress_view() as view:
            started = await source.start(guest.spec.uuid, target, options=options)
            migration = await follow(source, started.id, view, last=started)
    crossing = Crossing(migration, f"{here.host.name} to {there.host.name}", verified=verify is Verify.BYTES)
    if crossing.completed:
        arrived = await next_sign(guest, there.host)
        crossing = crossing.as_seen(await guest.gap_ms(there.host), watched.slowdown_percent(arrived))
    report.crossings.append(crossing)
    tell(_sentence(crossing))
    return crossing.completed


def _pause_ms(wishes: Wishes, way: Way | None) -> int | None:
    """Without KVM a guest whose memory is streamed is paused all the while."""
    return wishes.memory_mib * STREAM_MS_PER_MIB if way is Way.STREAM else None


def _sentence(crossing: Crossing) -> str:
    migration, start = crossing.migration, f"  {crossing.direction}    "
    if not crossing.completed:
        return f"{start}{outcome_name(migration)}: {migration.reason.reason}: {migration.reason.message}"
    figures = (
        f"downtime {crossing.downtime_ms:.1f} ms (the guest saw {crossing.guest_gap_ms or 0:.1f}), "
        f"guest slowed down by {crossing.guest_slowdown_percent or 0:.0f} %, "
        f"total {crossing.total_ms / 1000:.2f} s, {migration.progress.round} rounds, "
        f"{size(migration.progress.wire_bytes)} on the wire"
    )
    if words := clock_words(migration.clock):
        figures += f"\n            {words}"
    if crossing.verified:
        found = migration.verification
        return (
            f"{start}{figures}\n            compared {size(found.compared_bytes)} of memory, byte for byte, "
            f"while it was paused: {found.different_pages} pages differ"
        )
    return f"{start}{figures}"


def _print_end(report: Report) -> None:
    screen = console(stderr=False)
    if report.spans:
        print()
        screen.print(render_timeline(report.spans, screen.width))
    peaks = ", ".join(f"{name} {peak:.0f} MiB" for name, peak in report.peak_rss_mib.items())
    print(f"\npeak memory of the services: {peaks}")
    if report.broken is not None:
        say(f"remedy: {report.broken.migration.reason.remedy}")
        return
    print(f"memory identical: {_yes(report.memory_identical)}; the guest is well: {_yes(report.guest_ok)}")


def _params(wishes: Wishes) -> dict[str, str]:
    params = {"resident-mib": str(wishes.resident_mib)}
    if wishes.dirty_mib_per_s:
        params |= {
            "dirty-mib-per-s": str(wishes.dirty_mib_per_s),
            "working-set-mib": str(wishes.working_set_mib),
        }
    return params


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _nothing(_text: str) -> None:
    """The listener of a demonstration that prints a document instead."""


async def until_signalled(work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work; the first signal cancels it, and no other gets in the way of its cleaning up."""
    task = asyncio.ensure_future(work)
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        if not received:
            received.append(number)
            say("ending what was started ...")
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise typer.Exit(_SIGNALLED + received[0]) from None
        raise
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
