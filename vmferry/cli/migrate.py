"""``vmferry plan``, ``vmferry migrate`` and ``vmferry cancel``: what changes, or would change, where a machine runs.

Promise: a migration is started at most once, however often the answer is lost on the way; the exit code of a command
that waited says where the machine runs, or that this is not known.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from vmferry.cli.bounds import (
    BandwidthOption,
    Bounds,
    ChoiceOption,
    DeadlineOption,
    DowntimeOption,
    MaxDowntimeOption,
    PriorityOption,
    SwitchoverOption,
    ThrottleOption,
)
from vmferry.cli.connection import Source, calls_source
from vmferry.cli.findings import report_lines
from vmferry.cli.output import JsonOption, as_document, print_document, say
from vmferry.cli.progress import outcome_name, progress_view
from vmferry.cli.watch import MigrationArgument, finish, follow
from vmferry.client.draining import new_request_id
from vmferry.client.places import Target
from vmferry.errors import (
    IncompatibleError,
    InvalidArgumentError,
    PointOfNoReturnError,
)
from vmferry.telemetry.tracing import configure, phase
from vmferry.v1 import migration_pb2
from vmferry.v1.migration_pb2 import (
    MIGRATION_OUTCOME_COMPLETED,
    MIGRATION_PHASE_ENDED,
    MIGRATION_PHASE_PRECOPYING,
    CancelMigrationRequest,
    Migration,
    MigrationOptions,
    PlanMigrationRequest,
    SwitchNowRequest,
)

MIN_LANES: Final = 2
MAX_LANES: Final = 16
_COLLECTORS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_MIB: Final = 1024 * 1024


class Verify(enum.StrEnum):
    """How the copy is checked before the right to run moves."""

    DIGEST = "digest"
    BYTES = "bytes"


class Tracker(enum.StrEnum):
    """Ways of finding out which memory the guest wrote."""

    PAGEMAP_SCAN = "pagemap-scan"
    SOFT_DIRTY = "soft-dirty"
    HASH = "hash"


class Way(enum.StrEnum):
    """Ways for memory to travel."""

    DIRECT = "direct"
    STREAM = "stream"


class Compression(enum.StrEnum):
    """Ways for page contents to travel."""

    AUTO = "auto"
    NONE = "none"
    LZ4 = "lz4"
    ZSTD = "zstd"


MachineArgument = Annotated[str, typer.Argument(metavar="MACHINE", help="Name or UUID.")]
ToHostOption = Annotated[
    str,
    typer.Option(
        "--to-host", metavar="URI", help="Identity of the destination: spiffe://DOMAIN/vmhost/NAME."
    ),
]
ToAddressOption = Annotated[
    str,
    typer.Option(
        "--to-address", metavar="HOST:PORT", help="Its destination service, as the source reaches it."
    ),
]
LanesOption = Annotated[
    int | None, typer.Option("--lanes", min=MIN_LANES, max=MAX_LANES, help="Connections, each its own.")
]
VerifyOption = Annotated[
    Verify, typer.Option("--verify", help="'bytes' compares all memory while the guest is paused.")
]
TrackerOption = Annotated[Tracker | None, typer.Option("--tracker", help="Insist on this write tracker.")]
PathOption = Annotated[
    Way | None,
    typer.Option(
        "--path", help="Insist on how memory travels: 'direct', or in the hypervisor's own 'stream'."
    ),
]
CompressionOption = Annotated[
    Compression | None,
    typer.Option("--compression", help="How page contents travel; 'auto' chooses for each chunk what pays."),
]

ReconnectOption = Annotated[
    float | None,
    typer.Option(
        "--reconnect-timeout",
        metavar="SECONDS",
        min=0.001,
        help="How long a broken connection to the destination is tried again; the guest runs meanwhile.",
    ),
]
NoticeOption = Annotated[
    float | None,
    typer.Option(
        "--notice",
        metavar="SECONDS",
        min=0,
        help="How long the guest is told beforehand, unless it approves earlier; 0: it is not waited for.",
    ),
]


@calls_source
async def plan(
    source: Source,
    *,
    machine: MachineArgument,
    to_host: ToHostOption,
    to_address: ToAddressOption,
    downtime_limit_ms: DowntimeOption = None,
    lanes: LanesOption = None,
    verify: VerifyOption = Verify.DIGEST,
    tracker: TrackerOption = None,
    path: PathOption = None,
    compression: CompressionOption = None,
    max_downtime_ms: MaxDowntimeOption = None,
    max_bandwidth: BandwidthOption = "",
    switchover_bandwidth: SwitchoverOption = "",
    max_throttle_percent: ThrottleOption = None,
    on_no_convergence: ChoiceOption = None,
    prediction: Annotated[
        bool,
        typer.Option("--prediction/--no-prediction", help="Measure how long it would take, in a second."),
    ] = True,
    json: JsonOption = False,
) -> None:
    """Ask both hosts whether a machine could move, and change nothing; exit code 4 if something blocks."""
    bounds = Bounds(
        downtime_limit_ms,
        max_downtime_ms,
        max_bandwidth,
        switchover_bandwidth,
        max_throttle_percent,
        on_no_convergence,
    )
    request = PlanMigrationRequest(
        machine=machine,
        destination=destination(to_host, to_address).message(),
        options=migration_options(bounds, lanes, verify, tracker, path, compression),
        without_prediction=not prediction,
    )
    answer = await source.call(source.stub.PlanMigration, request)
    if json:
        print_document(as_document(answer.report))
    else:
        print("\n".join(report_lines(answer.report)))
    if not answer.report.compatible:
        raise typer.Exit(IncompatibleError.exit_code)


@calls_source
async def migrate(
    source: Source,
    *,
    machine: MachineArgument,
    to_host: ToHostOption,
    to_address: ToAddressOption,
    downtime_limit_ms: DowntimeOption = None,
    lanes: LanesOption = None,
    verify: VerifyOption = Verify.DIGEST,
    tracker: TrackerOption = None,
    path: PathOption = None,
    compression: CompressionOption = None,
    max_downtime_ms: MaxDowntimeOption = None,
    max_bandwidth: BandwidthOption = "",
    switchover_bandwidth: SwitchoverOption = "",
    max_throttle_percent: ThrottleOption = None,
    on_no_convergence: ChoiceOption = None,
    reconnect_timeout: ReconnectOption = None,
    notice: NoticeOption = None,
    deadline: DeadlineOption = "",
    priority: PriorityOption = None,
    request_id: Annotated[
        str, typer.Option("--request-id", metavar="UUID", help="Of an earlier call whose answer was lost.")
    ] = "",
    trace_dir: Annotated[
        Path | None,
        typer.Option("--trace-dir", envvar="VMFERRY_TRACE_DIR", help="Folder for this command's own spans."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
    json: JsonOption = False,
) -> None:
    """Move a running machine to another host; the exit code tells where it runs."""
    bounds = Bounds(
        downtime_limit_ms,
        max_downtime_ms,
        max_bandwidth,
        switchover_bandwidth,
        max_throttle_percent,
        on_no_convergence,
        deadline=deadline,
        priority=priority,
    )
    options = migration_options(bounds, lanes, verify, tracker, path, compression)
    for field, seconds in ((options.reconnect_timeout, reconnect_timeout), (options.notice, notice)):
        if seconds is not None:
            field.FromNanoseconds(int(seconds * 1e9))
    target = destination(to_host, to_address)
    request_id = _request_id(request_id) if request_id else new_request_id()
    with scheduling(trace_dir):
        migration = await source.start(machine, target, options=options, request_id=request_id)
        if not wait:
            _print_started(migration, json=json)
            return
        migration = await _followed(source, migration)
    finish(migration, json=json)


async def _followed(source: Source, migration: Migration) -> Migration:
    """Show it to its end; Ctrl-C ends the showing only."""
    try:
        async with source.keeping_ticket(migration):
            with progress_view() as view:
                return await follow(source, migration.id, view, last=migration)
    except asyncio.CancelledError:
        say(f"the migration goes on: vmferry watch {migration.id}, or vmferry cancel {migration.id}")
        raise


@calls_source
async def cancel(source: Source, *, migration_id: MigrationArgument, json: JsonOption = False) -> None:
    """Cancel a migration that has not begun its hand-off; the machine runs on where it is."""
    answer = await source.call(source.stub.CancelMigration, CancelMigrationRequest(id=migration_id))
    found = answer.migration
    if json:
        print_document(as_document(found))
    elif found.phase == MIGRATION_PHASE_ENDED:
        say(f"nothing to cancel: {ended_line(found)}")
    else:
        say(f"cancelling {found.id}: {found.machine} stays at {found.source}")
    if found.outcome == MIGRATION_OUTCOME_COMPLETED:
        raise typer.Exit(PointOfNoReturnError.exit_code)


@calls_source
async def switch_now(source: Source, *, migration_id: MigrationArgument, json: JsonOption = False) -> None:
    """Pause the guest after the round that is being copied, whatever the pause; typed twice, it is done once."""
    answer = await source.ask(lambda: source.call(source.stub.SwitchNow, SwitchNowRequest(id=migration_id)))
    if json:
        print_document(as_document(answer.migration))
    elif answer.migration.phase == MIGRATION_PHASE_ENDED:
        say(f"nothing to switch: {ended_line(answer.migration)}")
    elif answer.migration.phase > MIGRATION_PHASE_PRECOPYING:
        say(f"its guest is paused for the switch already: vmferry watch {answer.migration.id}")
    else:
        say(
            f"switching {answer.migration.id} as soon as this round is over: vmferry watch {answer.migration.id}"
        )


def ended_line(migration: Migration) -> str:
    """How a migration that has ended came out, and where its machine is."""
    where = f"belongs to {migration.owner}" if migration.owner else "belongs to nobody who is known"
    why = f" ({migration.reason.reason})" if migration.reason.reason else ""
    return f"{migration.id} has ended before, {outcome_name(migration)}{why}: {migration.machine} {where}"


@contextlib.contextmanager
def scheduling(trace_dir: Path | None) -> Iterator[None]:
    """The scheduler's span around what it asks for, if there is a folder or a collector that it can go to."""
    if trace_dir is None and not any(os.environ.get(name) for name in _COLLECTORS):
        yield
        return
    write_out = configure("scheduler", trace_dir, host=socket.gethostname())
    try:
        with phase("schedule"):
            yield
    finally:
        write_out()


def destination(to_host: str, to_address: str) -> Target:
    """Check the two options that say where a machine goes.

    Raises:
        InvalidArgumentError: naming the option at fault.
    """
    target = Target(to_host, to_address)
    target.message(host_field="--to-host", address_field="--to-address")
    return target


def migration_options(
    bounds: Bounds,
    lanes: int | None,
    verify: Verify,
    tracker: Tracker | None,
    path: Way | None = None,
    compression: Compression | None = None,
) -> MigrationOptions:
    """The options of a migration; what is not given is left to the source's configuration."""
    options = MigrationOptions(
        lanes=lanes or 0, tracker=tracker or "", path=path or "", compression=compression or ""
    )
    bounds.put_into(options)
    if verify is Verify.BYTES:
        options.verify = migration_pb2.VERIFY_MODE_BYTES
    return options


def _request_id(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise InvalidArgumentError(f"{text!r} is not a UUID", field="--request-id") from None


def _print_started(migration: Migration, *, json: bool) -> None:
    if json:
        print_document(as_document(migration))
        return
    print(migration.id)
    say(f"{migration.machine} is being migrated: vmferry watch {migration.id}")
