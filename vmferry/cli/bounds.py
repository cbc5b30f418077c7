"""The options that say how far a migration may go, and ``vmferry set``, which changes them on the way.

Promise: what is not given is left as it is: to the source's configuration when a migration starts, to what it was
afterwards.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from google.protobuf.duration_pb2 import Duration

from vmferry.cli.connection import Source, calls_source
from vmferry.cli.output import JsonOption, as_document, print_document, say
from vmferry.cli.units import bytes_per_second, moment
from vmferry.cli.watch import MigrationArgument
from vmferry.errors import InvalidArgumentError
from vmferry.transfer.convergence import MAX_THROTTLE_PERCENT
from vmferry.v1 import migration_pb2 as pb


class NoConvergence(enum.StrEnum):
    """What to do with a guest that writes too fast, when nothing else is left to try."""

    ABORT = "abort"
    WAIT = "wait"
    SWITCH = "switch"


HIGHEST_PRIORITY: Final = 9
_CHOICES: Final = {
    NoConvergence.ABORT: pb.ON_NO_CONVERGENCE_ABORT,
    NoConvergence.WAIT: pb.ON_NO_CONVERGENCE_WAIT,
    NoConvergence.SWITCH: pb.ON_NO_CONVERGENCE_SWITCH,
}

DowntimeOption = Annotated[
    int | None, typer.Option("--downtime-limit-ms", min=1, help="Longest pause the guest may see.")
]
MaxDowntimeOption = Annotated[
    int | None,
    typer.Option("--max-downtime-ms", min=1, help="Accept a pause up to this if it does not converge."),
]
BandwidthOption = Annotated[
    str,
    typer.Option(
        "--max-bandwidth",
        metavar="RATE",
        help="Most bytes per second, such as 100M; 0: the source's default.",
    ),
]
SwitchoverOption = Annotated[
    str,
    typer.Option("--switchover-bandwidth", metavar="RATE", help="The same while the guest is paused."),
]
ThrottleOption = Annotated[
    int | None,
    typer.Option(
        "--max-throttle-percent",
        min=0,
        max=MAX_THROTTLE_PERCENT,
        help="Slow the guest down so far if it does not converge.",
    ),
]
ChoiceOption = Annotated[
    NoConvergence | None, typer.Option("--on-no-convergence", help="What to do when nothing else helps.")
]

DeadlineOption = Annotated[
    str,
    typer.Option(
        "--deadline",
        metavar="TIME",
        help="Give up if it is not handed off by then: a time, or a span such as 10m.",
    ),
]
PriorityOption = Annotated[
    int | None,
    typer.Option("--priority", min=0, max=HIGHEST_PRIORITY, help="In the queue; a higher one begins first."),
]


@dataclass(frozen=True)
class Bounds:
    """What was given of these options."""

    downtime_limit_ms: int | None = None
    max_downtime_ms: int | None = None
    max_bandwidth: str = ""
    switchover_bandwidth: str = ""
    max_throttle_percent: int | None = None
    on_no_convergence: NoConvergence | None = None
    total_timeout_s: float | None = None
    deadline: str = ""
    priority: int | None = None

    def put_into(self, message: pb.MigrationOptions | pb.UpdateMigrationRequest) -> None:
        """Set the fields of what was given, and no others."""
        for name in ("max_bandwidth", "switchover_bandwidth"):
            if text := getattr(self, name):
                rate = bytes_per_second(text, field=f"--{name.replace('_', '-')}")
                setattr(message, name, rate)
        if self.max_throttle_percent is not None:
            message.max_throttle_percent = self.max_throttle_percent
        if self.on_no_convergence is not None:
            message.on_no_convergence = _CHOICES[self.on_no_convergence]
        if self.deadline:
            message.deadline.FromDatetime(moment(self.deadline, field="--deadline", ahead=True))
        if self.priority is not None:
            message.priority = self.priority
        times = {
            "downtime_limit": self.downtime_limit_ms,
            "max_downtime": self.max_downtime_ms,
            "total_timeout": None if self.total_timeout_s is None else round(self.total_timeout_s * 1000),
        }
        for name, milliseconds in times.items():
            if milliseconds is not None:
                duration: Duration = getattr(message, name)
                duration.FromMilliseconds(milliseconds)


@calls_source
async def set_(
    source: Source,
    *,
    migration_id: MigrationArgument,
    downtime_limit_ms: DowntimeOption = None,
    max_downtime_ms: MaxDowntimeOption = None,
    max_bandwidth: BandwidthOption = "",
    switchover_bandwidth: SwitchoverOption = "",
    max_throttle_percent: ThrottleOption = None,
    on_no_convergence: ChoiceOption = None,
    total_timeout_s: Annotated[
        float | None,
        typer.Option("--total-timeout-s", min=0.001, help="Limit before the hand-off, from the beginning."),
    ] = None,
    deadline: DeadlineOption = "",
    priority: PriorityOption = None,
    json: JsonOption = False,
) -> None:
    """Change limits of a migration that has not paused its guest for the switch yet."""
    bounds = Bounds(
        downtime_limit_ms,
        max_downtime_ms,
        max_bandwidth,
        switchover_bandwidth,
        max_throttle_percent,
        on_no_convergence,
        total_timeout_s,
        deadline,
        priority,
    )
    if bounds == Bounds():
        raise InvalidArgumentError(
            "nothing to change was given", remedy="See 'vmferry set --help' for what can be changed."
        )
    request = pb.UpdateMigrationRequest(id=migration_id)
    bounds.put_into(request)
    answer = await source.call(source.stub.UpdateMigration, request)
    if json:
        print_document(as_document(answer.migration))
    else:
        say(f"changed {answer.migration.id}")
