"""What a call asks for, read and checked: a migration's options and its destination.

Promise: a value that cannot be meant is refused by the name of its field before anything is begun; where the caller
is silent, the host's configuration speaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from google.protobuf.duration_pb2 import Duration

from source_svc.forecasts import Subject
from source_svc.peer import Destination
from vmferry.config import HostConfig
from vmferry.errors import InvalidArgumentError, VmferryError
from vmferry.machines.qmp import QmpMachine
from vmferry.negotiation.encodings import COMPRESSIONS
from vmferry.negotiation.path import PATHS, STREAM
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity, Kind
from vmferry.transfer.convergence import Limits
from vmferry.v1 import migration_pb2 as pb

_LONGEST_LIMIT_S: Final = 366 * 24 * 3600
"""Beyond it, times overflow somewhere in the libraries below."""
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
    reserve_timeout_s: float
    compare_bytes: bool
    tracker: str
    path: str
    compression: str

    def subject(self, machine: QmpMachine, destination: Destination, config: HostConfig) -> Subject:
        """What is to be predicted."""
        return Subject(
            machine,
            destination,
            self.lanes,
            config.chunk_bytes,
            Limits(self.downtime_limit_s, config.max_rounds),
            self.compare_bytes,
            self.compression,
        )


def read_order(
    options: pb.MigrationOptions, host: Host, migration_id: bytes = b"", ticket: bytes = b""
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
    return Order(
        migration_id=migration_id,
        ticket=ticket,
        lanes=options.lanes or config.lanes,
        downtime_limit_s=_seconds(options, "downtime_limit", config.downtime_limit_ms / 1000),
        standstill_limit_s=_seconds(options, "downtime_limit", config.standstill_limit_s),
        total_timeout_s=_seconds(options, "total_timeout", config.total_timeout_s),
        stall_timeout_s=_seconds(options, "stall_timeout", config.stall_timeout_s),
        reserve_timeout_s=_seconds(options, "reserve_timeout", config.reserve_timeout_s),
        compare_bytes=options.verify == pb.VERIFY_MODE_BYTES,
        tracker=options.tracker,
        path=options.path,
        compression=options.compression or config.compression,
    )


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
