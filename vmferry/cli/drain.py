"""``vmferry drain``, ``undrain`` and ``drain-status``: emptying a host before it is retired or updated.

Promise: the host that is emptied is named twice, as an argument and as the source that is talked to, and both must
agree. The drain belongs to the host, not to the command: Ctrl-C ends the watching and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Annotated, Final

import typer

from vmferry.cli.bounds import (
    BandwidthOption,
    Bounds,
    ChoiceOption,
    DowntimeOption,
    MaxDowntimeOption,
    ThrottleOption,
)
from vmferry.cli.connection import Source, calls_source, check_address, host_identity
from vmferry.cli.drain_view import changes, drain_lines, headline
from vmferry.cli.migrate import NoticeOption, ReconnectOption
from vmferry.cli.output import JsonOption, as_document, print_document, say
from vmferry.client.draining import drain_is_over
from vmferry.client.places import Target
from vmferry.errors import ExitCode, InvalidArgumentError
from vmferry.security.warrants import MAX_WARRANT_S
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1.migration_pb2 import MigrationOptions

_HOUR_S: Final = 3600
_SCHEME: Final = "spiffe://"

HostArgument = Annotated[
    str, typer.Argument(metavar="HOST", help="The host, by name or identity; it must be the one of --source.")
]
ToOption = Annotated[
    list[str],
    typer.Option(
        "--to",
        metavar="HOST=ADDRESS:PORT",
        help="A host that machines may go to, by name or identity, and its destination service; may be repeated.",
    ),
]
PatienceOption = Annotated[
    float,
    typer.Option(
        "--patience",
        metavar="SECONDS",
        min=0,
        help="How long to wait while nothing can move.",
    ),
]


@calls_source
async def drain(
    source: Source,
    *,
    host: HostArgument,
    to: ToOption,
    downtime_limit_ms: DowntimeOption = None,
    max_downtime_ms: MaxDowntimeOption = None,
    max_bandwidth: BandwidthOption = "",
    max_throttle_percent: ThrottleOption = None,
    on_no_convergence: ChoiceOption = None,
    reconnect_timeout: ReconnectOption = None,
    notice: NoticeOption = None,
    valid_hours: Annotated[
        int,
        typer.Option(
            "--valid-hours",
            min=1,
            max=MAX_WARRANT_S // _HOUR_S,
            help="How long machines may be moved by this.",
        ),
    ] = MAX_WARRANT_S // _HOUR_S,
    request_id: Annotated[
        str, typer.Option("--request-id", metavar="UUID", help="Of an earlier call whose answer was lost.")
    ] = "",
    patience: PatienceOption = 60.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the host is empty.")] = True,
    json: JsonOption = False,
) -> None:
    """Empty a host: it takes no newcomers, and its machines move to other hosts, the cheapest first."""
    _require_host(source, host)
    options = MigrationOptions()
    Bounds(
        downtime_limit_ms,
        max_downtime_ms,
        max_bandwidth,
        "",
        max_throttle_percent,
        on_no_convergence,
    ).put_into(options)
    for field, seconds in ((options.reconnect_timeout, reconnect_timeout), (options.notice, notice)):
        if seconds is not None:
            field.FromNanoseconds(int(seconds * 1e9))
    targets = [_target(source, text) for text in to]
    found = await source.drain(
        targets, options=options, request_id=_checked(request_id), valid_s=valid_hours * _HOUR_S
    )
    if not wait:
        _show(found, json=json)
        say(f"{found.host} is being emptied: vmferry drain-status --watch")
        return
    try:
        found = await _follow(source, found, patience)
    except asyncio.CancelledError:
        say("the drain goes on: vmferry drain-status --watch, or vmferry undrain")
        raise
    _finish(found, json=json)


@calls_source
async def undrain(source: Source, *, host: HostArgument, json: JsonOption = False) -> None:
    """Undo a drain: the host takes newcomers again, what waits is cancelled, what is under way ends as it will."""
    _require_host(source, host)
    found = await source.undrain()
    _show(found, json=json)
    moving = [item.machine for item in found.machines if item.state == dp.DRAINED_MACHINE_STATE_MOVING]
    if moving:
        say(f"under way, and going on to their end: {', '.join(moving)} (vmferry drain-status)")
    if not found.takes_newcomers and found.newcomers_note:
        say(f"it still takes no newcomers: {found.newcomers_note}")


@calls_source
async def drain_status(
    source: Source,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until the drain is over.")] = False,
    patience: PatienceOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Show how the drain of a host stands: every machine, where it went, or what is in its way."""
    found = await source.get_drain()
    if watch:
        _finish(await _follow(source, found, patience), json=json)
    _show(found, json=json)


async def _follow(source: Source, last: dp.Drain, patience_s: float) -> dp.Drain:
    """Watch until the drain is over, or nothing has been able to move for a while."""
    states = source.watch_drain(on_lost=lambda: say("the connection to the source is lost; trying again"))
    shown = last
    say(headline(last))
    now = asyncio.get_running_loop().time
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as limit, contextlib.aclosing(states):
            async for seen in states:
                last = seen
                stuck = last.state == dp.DRAIN_STATE_STUCK
                if not stuck or limit.when() is None:
                    limit.reschedule(now() + patience_s if stuck else None)
                for line in changes(shown, last):
                    say(line)
                shown = last
                if drain_is_over(last):
                    break
    return last


def _finish(found: dp.Drain, *, json: bool) -> None:
    _show(found, json=json)
    raise typer.Exit(exit_code(found))


def exit_code(drain: dp.Drain) -> ExitCode:
    """0: the host is empty, or its drain was undone; 6: something here is not known; 4: what is left cannot move."""
    if drain.state in (dp.DRAIN_STATE_DRAINED, dp.DRAIN_STATE_NONE):
        return ExitCode.OK
    blocked = any(item.state == dp.DRAINED_MACHINE_STATE_BLOCKED for item in drain.machines)
    return ExitCode.UNKNOWN if blocked else ExitCode.PRECONDITION


def _show(found: dp.Drain, *, json: bool) -> None:
    if json:
        print_document(as_document(found))
    else:
        print("\n".join(drain_lines(found)))


def _require_host(source: Source, host: str) -> None:
    """Refuse to do to one host what was meant for another."""
    if host not in (source.host.name, source.host.uri):
        raise InvalidArgumentError(
            f"{host} is not the host of the source that is talked to, which is {source.host}",
            field="HOST",
            remedy="Name the source service of that host: --source, --source-host (or VMFERRY_SOURCE, ..._HOST).",
        )


def _target(source: Source, text: str) -> Target:
    host, separator, address = text.rpartition("=")
    if not separator:
        raise InvalidArgumentError(f"{text!r} is not of the form HOST=ADDRESS:PORT", field="--to")
    if not host.startswith(_SCHEME):
        host = f"{_SCHEME}{source.host.trust_domain}/vmhost/{host}"
    return Target(host_identity(host, field="--to").uri, check_address(address, field="--to"))


def _checked(request_id: str) -> str:
    try:
        return str(uuid.UUID(request_id)) if request_id else ""
    except ValueError:
        raise InvalidArgumentError(f"{request_id!r} is not a UUID", field="--request-id") from None
