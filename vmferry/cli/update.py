"""``vmferry update``: another hypervisor beneath a running guest, which stays where it is.

Promise: at most one update is started, however often the answer is lost; the exit code says whether the guest runs in
the new process, goes on in the old one, or was lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from vmferry.cli.clocks import clock_document, clock_words
from vmferry.cli.connection import Source, calls_source
from vmferry.cli.migrate import MachineArgument
from vmferry.cli.output import JsonOption, as_document, milliseconds, print_document, say
from vmferry.client.updating import Wanted
from vmferry.errors import ExitCode, catalogue
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_to_message
from vmferry.v1 import update_pb2 as pb

OUTCOMES: Final = {
    pb.UPDATE_OUTCOME_COMPLETED: "completed",
    pb.UPDATE_OUTCOME_ROLLED_BACK: "rolled-back",
    pb.UPDATE_OUTCOME_LOST: "lost",
}


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
        _print_check(await source.check_update(wanted), json=json)
        return
    found = await source.update_in_place(wanted)
    if json:
        print_document(document(found))
    else:
        say(sentence(found))
    raise typer.Exit(exit_code(found))


def exit_code(found: pb.Update) -> ExitCode:
    """How the command ends."""
    if found.outcome == pb.UPDATE_OUTCOME_COMPLETED:
        return ExitCode.OK
    error = catalogue().get(found.reason.reason)
    return error.exit_code if error is not None else ExitCode.FAILED


def document(found: pb.Update) -> dict[str, Any]:
    """An ended update for programs."""
    return {
        "id": found.id,
        "machine": found.machine,
        "outcome": OUTCOMES.get(found.outcome, "unknown"),
        "reason": found.reason.reason,
        "message": found.reason.message,
        "pause_ms": milliseconds(found.pause),
        "memory_bytes": found.memory_bytes,
        "bytes_copied": found.bytes_copied,
        **clock_document(found.clock),
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
    clock = clock_words(found.clock) or "nothing is known of its clock"
    return (
        f"{found.machine} runs on in process {found.pid}: {found.old_version} -> {found.new_version}, paused for "
        f"{milliseconds(found.pause):.1f} ms, nothing copied; {clock}"
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
