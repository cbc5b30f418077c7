"""``vmferry update``: another hypervisor beneath a running guest, which stays where it is.

Promise: at most one update is started, however often the answer is lost; the exit code says whether the guest runs in
the new process, goes on in the old one, or was lost.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import grpc.aio
import typer

from vmferry.cli.connection import Source, calls_source
from vmferry.cli.migrate import MachineArgument
from vmferry.cli.output import JsonOption, as_document, milliseconds, print_document, say
from vmferry.client.draining import new_request_id
from vmferry.client.watching import AWAY
from vmferry.errors import ExitCode, PeerUnreachableError, TimedOutError, catalogue
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_to_message
from vmferry.v1 import update_pb2 as pb
from vmferry.v1.update_pb2_grpc import UpdateServiceStub

OUTCOMES: Final = {
    pb.UPDATE_OUTCOME_COMPLETED: "completed",
    pb.UPDATE_OUTCOME_ROLLED_BACK: "rolled-back",
    pb.UPDATE_OUTCOME_LOST: "lost",
}
_TRIES: Final = 120
_RETRY_S: Final = 0.5


@dataclass(frozen=True)
class Wanted:
    """What the machine is to be, and how long it may take."""

    machine: str
    target: pb.UpdateTarget
    max_pause_s: float | None = None
    notice_s: float | None = None


def target_of(qemu_binary: str, spec: Path | None) -> pb.UpdateTarget:
    """What the options describe.

    Raises:
        InvalidArgumentError: the file is no description.
    """
    target = pb.UpdateTarget(qemu_binary=qemu_binary)
    if spec is not None:
        target.spec.CopyFrom(spec_to_message(MachineSpec.load(spec)))
    return target


@calls_source
async def update(
    source: Source,
    *,
    machine: MachineArgument,
    qemu_binary: Annotated[
        str, typer.Option("--qemu-binary", metavar="PATH", help="Hypervisor that is to run it, on that host.")
    ] = "",
    spec: Annotated[
        Path | None, typer.Option("--spec", metavar="FILE", help="Description of what it is to be.")
    ] = None,
    max_pause_s: Annotated[
        float | None, typer.Option("--max-pause", metavar="SECONDS", help="Undo an update that takes longer.")
    ] = None,
    notice_s: Annotated[
        float | None,
        typer.Option("--notice", metavar="SECONDS", help="How long the guest may take to approve."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what stands in the way.")] = False,
    json: JsonOption = False,
) -> None:
    """Put another hypervisor process beneath a running machine; its memory is not copied."""
    wanted = Wanted(machine, target_of(qemu_binary, spec), max_pause_s, notice_s)
    if check:
        _print_check(await check_update(source, wanted), json=json)
        return
    found = await update_in_place(source, wanted)
    if json:
        print_document(document(found))
    else:
        say(sentence(found))
    raise typer.Exit(exit_code(found))


async def check_update(source: Source, wanted: Wanted) -> pb.CheckUpdateResponse:
    """What stands in the way."""
    request = pb.CheckUpdateRequest(machine=wanted.machine, target=wanted.target)
    return await source.call(UpdateServiceStub(source.channel).CheckUpdate, request)


async def update_in_place(source: Source, wanted: Wanted) -> pb.Update:
    """Start an update and wait for its end; a lost connection is taken up again.

    Raises:
        VmferryError: it was not started, or (PeerUnreachableError) that is not known.
    """
    request = pb.UpdateInPlaceRequest(
        machine=wanted.machine, request_id=new_request_id(), target=wanted.target
    )
    if wanted.max_pause_s is not None:
        request.max_pause.FromNanoseconds(int(wanted.max_pause_s * 1e9))
    if wanted.notice_s is not None:
        request.notice.FromNanoseconds(int(wanted.notice_s * 1e9))

    async def begin() -> pb.UpdateInPlaceResponse:
        return await source.call(UpdateServiceStub(source.channel).UpdateInPlace, request)

    found = (await source.ask(begin)).update
    for _ in range(_TRIES):
        try:
            return await _followed(source, found)
        except (*AWAY, TimedOutError):
            await asyncio.sleep(_RETRY_S)
    raise PeerUnreachableError(f"the source does not answer; the update {found.id} may have gone on")


async def _followed(source: Source, found: pb.Update) -> pb.Update:
    stub = UpdateServiceStub(source.channel)
    try:
        async for answer in stub.WatchUpdate(pb.WatchUpdateRequest(id=found.id)):
            found = answer.update
    except grpc.aio.AioRpcError as error:
        raise source.explain(error, source.host) from error
    if found.phase != pb.UPDATE_PHASE_ENDED:
        raise PeerUnreachableError("the source ended the answer before the update had ended")
    return found


def exit_code(found: pb.Update) -> ExitCode:
    """How the command ends."""
    if found.outcome == pb.UPDATE_OUTCOME_COMPLETED:
        return ExitCode.OK
    error = catalogue().get(found.reason.reason)
    return error.exit_code if error is not None else ExitCode.FAILED


def document(found: pb.Update) -> dict[str, Any]:
    """An ended update for programs."""
    clock = found.clock
    return {
        "id": found.id,
        "machine": found.machine,
        "outcome": OUTCOMES.get(found.outcome, "unknown"),
        "reason": found.reason.reason,
        "message": found.reason.message,
        "pause_ms": milliseconds(found.pause),
        "memory_bytes": found.memory_bytes,
        "bytes_copied": found.bytes_copied,
        "clock_offset_before_ms": clock.offset_before_us / 1000,
        "clock_offset_after_ms": clock.offset_after_us / 1000,
        "clock_method": clock.method,
        "clock_measured": clock.measured,
        "clock_note": clock.note,
        "old_version": found.old_version,
        "new_version": found.new_version,
        "trace_id": found.trace_id,
        "event_id": found.event_id,
        "pid": found.pid,
    }


def sentence(found: pb.Update) -> str:
    """An ended update for people."""
    if found.outcome != pb.UPDATE_OUTCOME_COMPLETED:
        reason = found.reason
        word = OUTCOMES.get(found.outcome, "unknown")
        return f"{found.machine}: {word}: {reason.reason}: {reason.message}\n  remedy: {reason.remedy}"
    return (
        f"{found.machine} runs on in process {found.pid}: {found.old_version} -> {found.new_version}, paused for "
        f"{milliseconds(found.pause):.1f} ms, nothing copied; its clock is off by "
        f"{found.clock.offset_after_us / 1000:.1f} ms ({found.clock.method})"
    )


def _print_check(found: pb.CheckUpdateResponse, *, json: bool) -> None:
    if json:
        print_document(as_document(found))
    elif found.eligible:
        say(f"it can be updated in place: {found.old_version} -> {found.new_version}")
    else:
        for one in found.obstacles:
            say(f"{one.id}: {one.message}\n  remedy: {one.remedy}")
    raise typer.Exit(ExitCode.OK if found.eligible else ExitCode.PRECONDITION)
