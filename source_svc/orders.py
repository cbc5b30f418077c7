"""What a call asks for, read and checked: a migration's options and its destination.

Promise: a value that cannot be meant is refused by the name of its field before anything is begun; where the caller
is silent, the host's configuration speaks.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, replace
from datetime import UTC
from typing import Final

from google.protobuf.duration_pb2 import Duration

from source_svc.forecasts import Subject
from source_svc.peer import Destination
from source_svc.queue_policy import HIGHEST_PRIORITY
from vmferry.config import HostConfig
from vmferry.errors import InvalidArgumentError, VmferryError
from vmferry.machines.qmp import QmpMachine
from vmferry.negotiation.encodings import COMPRESSIONS
from vmferry.negotiation.path import PATHS, STREAM
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity, Kind
from vmferry.transfer.convergence import MAX_THROTTLE_PERCENT, Limits, OnNoConvergence
from vmferry.transfer.pacing import LEAST_BYTES_PER_S
from vmferry.v1 import migration_pb2 as pb

_LONGEST_LIMIT_S: Final = 366 * 24 * 3600
"""Beyond it, times overflow somewhere in the libraries below."""
_GIB: Final = 1 << 30
_CHOICES: Final = {
    pb.ON_NO_CONVERGENCE_ABORT: OnNoConvergence.ABORT,
    pb.ON_NO_CONVERGENCE_WAIT: OnNoConvergence.WAIT,
    pb.ON_NO_CONVERGENCE_SWITCH: OnNoConvergence.SWITCH,
}
_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


@dataclass(frozen=True)
class Order:
    """What a caller asked for, with the configuration's values where they were silent."""

    migration_id: bytes
    ticket: bytes
    lanes: int
    downtime_limit_s: float
    standstill_limit_s: float
    """The same for a guest whose memory can only be sent while it stands still."""
    total_timeout_s: float
    stall_timeout_s: float
    reconnect_timeout_s: float
    reserve_timeout_s: float
    compare_bytes: bool
    tracker: str
    path: str
    compression: str
    max_downtime_s: float
    """Longest pause that is acceptable if rounds do not converge."""
    on_no_convergence: OnNoConvergence
    max_throttle_percent: int
    max_bandwidth: float | None
    """Bytes per second while the guest runs."""
    switchover_bandwidth: float | None
    """Bytes per second while it is paused."""
    no_progress_s: float
    max_rounds: int
    notice_s: float
    """How long the guest is told beforehand, unless it approves earlier."""

    def limits(self, *, live: bool = True) -> Limits:
        """What the policy of convergence may do; ``live`` if the guest runs while its memory is sent."""
        return Limits(
            self.downtime_limit_s if live else self.standstill_limit_s,
            self.max_rounds,
            max_downtime_s=self.max_downtime_s,
            max_throttle_percent=self.max_throttle_percent,
            on_no_convergence=self.on_no_convergence,
            no_progress_s=self.no_progress_s,
            precopy_bytes_per_s=self.max_bandwidth,
            pause_bytes_per_s=self.switchover_bandwidth,
        )

    def subject(self, machine: QmpMachine, destination: Destination, config: HostConfig) -> Subject:
        """What is to be predicted."""
        return Subject(
            machine,
            destination,
            self.lanes,
            config.chunk_bytes,
            # Nobody can tell beforehand what slowing the guest down would do.
            replace(self.limits(), max_throttle_percent=0, on_no_convergence=OnNoConvergence.ABORT),
            self.compare_bytes,
            self.compression,
        )


def read_order(
    options: pb.MigrationOptions,
    host: Host,
    memory_bytes: int,
    migration_id: bytes = b"",
    ticket: bytes = b"",
) -> Order:
    """What the options of a call ask for; refuses what cannot be meant, by the name of the field."""
    config = host.config
    if options.lanes and not 2 <= options.lanes <= 16:  # noqa: PLR2004 - the documented range
        raise InvalidArgumentError("lanes must be between 2 and 16", field="options.lanes")
    if options.verify not in pb.VerifyMode.values():
        raise InvalidArgumentError(f"there is no verify mode {options.verify}", field="options.verify")
    known = [tracker.kind for tracker in host.trackers]
    if options.tracker and options.tracker not in known:
        raise InvalidArgumentError(f"tracker must be one of {', '.join(known)}", field="options.tracker")
    if options.path not in ("", *PATHS):
        raise InvalidArgumentError(f"path must be one of {', '.join(PATHS)}", field="options.path")
    if options.compression not in ("", *COMPRESSIONS):
        raise InvalidArgumentError(
            f"compression must be one of {', '.join(COMPRESSIONS)}", field="options.compression"
        )
    if options.path == STREAM and options.tracker:
        raise InvalidArgumentError(
            "a hypervisor that streams its memory tracks writes itself", field="options.tracker"
        )
    _check_queueing(options)
    gib = memory_bytes / _GIB
    total_s = max(config.total_timeout_s, config.total_timeout_per_gib_s * gib)
    downtime_s = _seconds(options, "downtime_limit", config.downtime_limit_ms / 1000)
    return Order(
        migration_id=migration_id,
        ticket=ticket,
        lanes=options.lanes or config.lanes,
        downtime_limit_s=downtime_s,
        standstill_limit_s=_seconds(options, "downtime_limit", config.standstill_limit_s),
        total_timeout_s=_seconds(options, "total_timeout", total_s),
        stall_timeout_s=_seconds(options, "stall_timeout", config.stall_timeout_s),
        reconnect_timeout_s=_seconds(options, "reconnect_timeout", config.reconnect_timeout_s),
        reserve_timeout_s=_seconds(options, "reserve_timeout", config.reserve_timeout_s),
        compare_bytes=options.verify == pb.VERIFY_MODE_BYTES,
        tracker=options.tracker,
        path=options.path,
        compression=options.compression or config.compression,
        max_downtime_s=_longest_downtime_s(options, downtime_s, config),
        on_no_convergence=_choice(options, config),
        max_throttle_percent=_throttle_percent(options, config),
        max_bandwidth=_rate(options.max_bandwidth, config.max_bandwidth_bytes_per_s, "max_bandwidth"),
        switchover_bandwidth=_rate(
            options.switchover_bandwidth, config.switchover_bandwidth_bytes_per_s, "switchover_bandwidth"
        ),
        no_progress_s=config.no_progress_per_gib_s * max(1.0, gib),
        max_rounds=config.max_rounds,
        notice_s=_notice_s(options, config),
    )


def read_update(
    request: pb.UpdateMigrationRequest, options: pb.MigrationOptions, host: Host, memory_bytes: int
) -> tuple[pb.MigrationOptions, Order]:
    """The options of a migration with what a call changes, and what they ask for then."""
    changed = pb.MigrationOptions()
    changed.CopyFrom(options)
    for name in ("max_bandwidth", "switchover_bandwidth", "max_throttle_percent", "priority"):
        if request.HasField(name):
            setattr(changed, name, getattr(request, name))
    for name in ("downtime_limit", "max_downtime", "total_timeout", "deadline"):
        if request.HasField(name):  # type: ignore[arg-type]  # the name is one of its fields
            getattr(changed, name).CopyFrom(getattr(request, name))
    changed.on_no_convergence = request.on_no_convergence or changed.on_no_convergence
    try:
        return changed, read_order(changed, host, memory_bytes)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(error.message, field=error.field.removeprefix("options.")) from error


def read_destination(destination: pb.Destination, own: Identity) -> tuple[Identity, str]:
    """The host and the address that a call names."""
    required(destination.host, "destination.host")
    try:
        host = Identity.parse(destination.host)
    except VmferryError as error:
        raise InvalidArgumentError(error.message, field="destination.host") from error
    if host.kind is not Kind.VMHOST or host.trust_domain != own.trust_domain:
        raise InvalidArgumentError(f"{host} is not a host of {own.trust_domain}", field="destination.host")
    if host == own:
        raise InvalidArgumentError("the machine is on this host already", field="destination.host")
    match = _ADDRESS.fullmatch(destination.address)
    if match is None or not 0 < int(match[2]) < 65536:  # noqa: PLR2004 - port numbers
        raise InvalidArgumentError("address must be NAME:PORT", field="destination.address")
    return host, destination.address


def required(value: str, field: str) -> str:
    """A text that a call must not leave out."""
    if not value:
        raise InvalidArgumentError(f"{field} is required", field=field)
    return value


def check_request_id(request_id: str) -> None:
    """Refuse a request_id that is no UUID."""
    try:
        uuid.UUID(request_id)
    except ValueError:
        raise InvalidArgumentError(
            "request_id must be a UUID",
            field="request_id",
            remedy="Make one up per migration and repeat it when you repeat the call.",
        ) from None


def _check_queueing(options: pb.MigrationOptions) -> None:
    if options.priority > HIGHEST_PRIORITY:
        raise InvalidArgumentError(
            f"priority must be between 0 and {HIGHEST_PRIORITY}", field="options.priority"
        )
    try:
        options.deadline.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidArgumentError("the deadline is no time", field="options.deadline") from None


def _seconds(options: pb.MigrationOptions, name: str, default: float) -> float:
    if not options.HasField(name):  # type: ignore[arg-type]  # the name is one of its fields
        return default
    value: Duration = getattr(options, name)
    seconds = value.seconds + value.nanos / 1e9
    if not 0 < seconds <= _LONGEST_LIMIT_S:
        raise InvalidArgumentError(
            f"{name} must be longer than 0 and at most {_LONGEST_LIMIT_S} s", field=f"options.{name}"
        )
    return seconds


def _notice_s(options: pb.MigrationOptions, config: HostConfig) -> float:
    if not options.HasField("notice"):
        return config.event_notice_s
    seconds = options.notice.seconds + options.notice.nanos / 1e9
    if not 0 <= seconds <= _LONGEST_LIMIT_S:
        raise InvalidArgumentError(
            f"notice must be at least 0 and at most {_LONGEST_LIMIT_S} s", field="options.notice"
        )
    return seconds


def _longest_downtime_s(options: pb.MigrationOptions, downtime_s: float, config: HostConfig) -> float:
    longest_s = _seconds(options, "max_downtime", max(downtime_s, config.max_downtime_ms / 1000))
    if longest_s < downtime_s:
        raise InvalidArgumentError(
            "max_downtime must not be shorter than downtime_limit", field="options.max_downtime"
        )
    return longest_s


def _choice(options: pb.MigrationOptions, config: HostConfig) -> OnNoConvergence:
    if not options.on_no_convergence:
        return OnNoConvergence(config.on_no_convergence)
    if options.on_no_convergence not in _CHOICES:
        raise InvalidArgumentError(
            f"there is no choice {options.on_no_convergence}", field="options.on_no_convergence"
        )
    return _CHOICES[options.on_no_convergence]


def _throttle_percent(options: pb.MigrationOptions, config: HostConfig) -> int:
    if options.max_throttle_percent > MAX_THROTTLE_PERCENT:
        raise InvalidArgumentError(
            f"max_throttle_percent must be at most {MAX_THROTTLE_PERCENT}",
            field="options.max_throttle_percent",
        )
    return options.max_throttle_percent or config.max_throttle_percent


def _rate(value: int, default: int, name: str) -> float | None:
    if 0 < value < LEAST_BYTES_PER_S:
        raise InvalidArgumentError(
            f"{name} must be at least {LEAST_BYTES_PER_S} bytes per second, or 0 for the service's configuration",
            field=f"options.{name}",
        )
    return float(value or default) or None
