"""The one typed configuration of a host, shared by its two services and by the command line.

Promise: every number a user may want to change is a field here, with its unit in its name and its default in
one place; a file with an unknown key, a wrong type or a value out of range is refused by name.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path

from vmferry.errors import ConfigError
from vmferry.transfer.convergence import MAX_THROTTLE_PERCENT, OnNoConvergence
from vmferry.transfer.pacing import LEAST_BYTES_PER_S

_MIB = 1024 * 1024
_LONGEST_S = 366 * 24 * 3600
_LARGEST_CHUNK_BYTES = 7 * _MIB // 2
"""A message may have 4 MiB, and says in its head where each page belongs."""


@dataclass(frozen=True)
class HostConfig:
    """Settings of one host. Paths may be relative to the configuration file."""

    tls_dir: Path = Path("/etc/vmferry/tls")
    """Holds ca.pem, tls.crt and tls.key (mode 0600); the host's identity is the certificate's URI SAN."""
    state_dir: Path = Path("/var/lib/vmferry")
    """Journals and other things that must survive a reboot."""
    run_dir: Path = Path("/run/vmferry")
    """Machines' sockets, process records and logs; may be lost in a reboot, as the machines are."""
    ram_dir: Path = Path("/dev/shm/vmferry")  # noqa: S108 - guest memory belongs on tmpfs; files are 0600 in a 0700 folder
    """Where guest memory files are made; must be tmpfs."""
    huge_dir: Path = Path()
    """Where guest memory in huge pages is made; must be on hugetlbfs. Empty string: such machines are refused."""
    trace_dir: Path = Path("/var/lib/vmferry/traces")
    """Spans as JSON lines, one file per service; empty string switches the file off."""

    source_listen: str = "0.0.0.0:7601"
    """Data port of the source service, mutually authenticated TLS only."""
    dest_listen: str = "0.0.0.0:7602"
    """Data port of the destination service, mutually authenticated TLS only."""
    source_admin_listen: str = "unix:source-admin.sock"
    """Health, reflection and channelz of the source service: a unix socket in run_dir, or a loopback port."""
    dest_admin_listen: str = "unix:dest-admin.sock"
    """The same for the destination service."""
    source_http_listen: str = "unix:source-http.sock"
    """Metrics and the web page of the source service: a unix socket in run_dir, or a loopback port; read only. Empty
    string: none."""
    dest_http_listen: str = "unix:dest-http.sock"
    """The same for the destination service."""

    lanes: int = field(default_factory=lambda: max(2, min(4, os.cpu_count() or 2)))
    """Connections per migration; by default as many as the host has cores, from 2 to 4: more only cost time."""
    window_bytes: int = 16 * _MIB
    """Bytes of memory in flight per migration, over all lanes; bounds the memory of both services."""
    shared_window_bytes: int = 48 * _MIB
    """The same of all migrations that leave this host at a time: each has at most an equal part of it."""
    chunk_bytes: int = _LARGEST_CHUNK_BYTES
    """Page contents per message, or less where a lane's part of window_bytes is less."""
    compression: str = "auto"
    """How page contents travel unless a caller says: auto (chosen for each chunk), none, lz4 or zstd."""
    downtime_limit_ms: int = 300
    """Longest pause a guest may see; pre-copy goes on until the rest fits."""
    max_downtime_ms: int = 0
    """Longest pause that is acceptable if rounds do not converge; 0: downtime_limit_ms is never raised."""
    on_no_convergence: str = "abort"
    """What becomes of a migration that does not converge whatever was tried: abort, wait or switch."""
    max_throttle_percent: int = 0
    """How far guests may be slowed down to converge, at most 95; 0: only where a caller allows it."""
    max_bandwidth_bytes_per_s: int = 0
    """What a migration may put on the wire while its guest runs; 0: no limit."""
    switchover_bandwidth_bytes_per_s: int = 0
    """The same while its guest is paused; 0: no limit."""
    standstill_limit_s: float = 60.0
    """The same for a guest whose memory can only be sent while it stands still, unless a caller names a limit."""
    max_rounds: int = 30
    """Pre-copy gives up after so many rounds."""
    reserve_timeout_s: float = 60.0
    """Limit for the destination to take memory and start its copy."""
    stall_timeout_s: float = 30.0
    """Limit without any acknowledged progress while all lanes are connected."""
    reconnect_timeout_s: float = 60.0
    """How long a broken connection to the destination is tried again before the hand-off; the guest runs on."""
    max_reconnect_timeout_s: float = 600.0
    """A destination keeps an attempt for a source whose connections broke at most so long, whatever it asks for."""
    total_timeout_s: float = 3600.0
    """Limit for everything before the hand-off, or what the next setting comes to if that is longer."""
    total_timeout_per_gib_s: float = 60.0
    """The same for each GiB of the machine's memory."""
    no_progress_per_gib_s: float = 60.0
    """Rounds that have left no less to send for so long count as not converging; for each GiB of memory."""
    switch_timeout_s: float = 5.0
    """Limit from pausing the guest to the hand-off; afterwards the source resumes it."""
    rpc_timeout_s: float = 10.0
    """Limit of one control call between the services."""
    qmp_timeout_s: float = 10.0
    """Limit of one command to a hypervisor."""
    agent_timeout_s: float = 5.0
    """How long the agent in a guest may take to have its clock put right, after the guest has been resumed."""
    negotiate_timeout_s: float = 20.0
    """Limit for the destination to say what it offers; the first time, it tries its hypervisors for that."""
    handoff_retry_s: float = 0.5
    """Pause between two attempts to learn the outcome of a hand-off."""
    cold_boot_wait_s: float = 60.0
    """A source that lost the guest's memory before the hand-off waits so long for a destination that cannot be
    reached and may hold the only copy; then it takes the machine back, to be started anew. inf: for ever."""
    receive_timeout_s: float = 60.0
    """A destination closes an attempt that made no progress for so long before it was prepared; the time for which
    its source tries a broken connection again comes on top."""
    stop_timeout_s: float = 0.0
    """A service that is told to stop takes nothing new, and gives migrations that run so long to end; what has not
    begun its hand-off by then is given back. 0: give back at once."""
    max_outgoing: int = 2
    """Migrations leaving this host at a time; more wait in its queue."""
    max_incoming: int = 2
    """Migrations arriving at this host at a time; more wait at their sources."""
    max_queued: int = 1000
    """Migrations that may wait in the queue; more are refused."""
    queue_retry_s: float = 1.0
    """How long a destination without room is left alone before it is asked again; doubled after each such answer."""
    max_queue_retry_s: float = 15.0
    """The most that this is doubled to."""
    history_max_age_days: float = 90.0
    """Ended migrations are remembered for so long."""
    history_max_count: int = 10000
    """At most so many ended migrations are remembered, the newest."""
    draining: bool = False
    """Take no newcomers, because this host is being emptied; machines may leave."""
    drain_retry_s: float = 30.0
    """While this host is being emptied, what failed rests so long before it is tried again; then longer each time."""
    drain_look_s: float = 15.0
    """How old a destination's report may be while this host is being emptied."""
    drain_measure_s: float = 15.0
    """How long the first machines' costs may be measured before the first one moves; the others' are estimated."""
    qemu_binaries: tuple[Path, ...] = (Path("/usr/bin/qemu-system-x86_64"),)
    """The only binaries that a QEMU machine may name when it arrives here."""
    image_roots: tuple[Path, ...] = (Path("/var/lib/vmferry/images"),)
    """Kernels, firmware and disks of arriving machines must lie below one of these."""
    taps: tuple[str, ...] = ()
    """Tap interfaces of this host that arriving machines may use."""
    memory_headroom_mib: int = 256
    """Memory that arriving machines must leave free on this host."""
    event_notice_s: float = 0.0
    """How long before it is paused a guest is told, unless it approves earlier or a caller says otherwise; Azure
    gives 900. 0: the event appears, and nobody is waited for."""
    event_minimum_notice: bool = False
    """Whether no event gets less notice than Azure documents for its type (a Freeze 15 minutes), whoever asks for
    less. A guest that approves, or is not listening (``event_idle_s``), shortens it all the same."""
    event_idle_s: float = 0.0
    """After so long without a request a guest counts as not listening: nobody waits for it, and the numbers of its
    documents begin anew with its next request; Azure 86400. 0: every guest counts as listening."""
    event_linger_s: float = 0.0
    """How long an event stays listed as Started after it is over, for guests that ask seldom."""
    event_peers: tuple[str, ...] = ()
    """Source services of other hosts with machines of the same availability sets, to be asked for their events:
    ``spiffe://DOMAIN/vmhost/NAME=HOST:PORT``."""
    metadata_requests_per_s: int = 5
    """Requests to the metadata service that each machine may make within any second."""
    metadata_listen: tuple[str, ...] = ()
    """Further listeners of the metadata service, each for one machine: NAME=ADDRESS:PORT, or with %INTERFACE behind
    it to be reached through that interface only."""
    ready_memory_mib: tuple[int, ...] = ()
    """Memory that is taken and zeroed before machines arrive, in files of these sizes in ram_dir; filled again when
    nobody arrives, and given up when somebody needs memory who cannot use it."""
    log_level: str = "info"
    """Least severe messages that are logged: debug, info, warning or error."""

    def __post_init__(self) -> None:
        positive = (
            "window_bytes", "shared_window_bytes",
            "max_rounds", "reserve_timeout_s", "stall_timeout_s", "total_timeout_s",
            "switch_timeout_s", "standstill_limit_s", "rpc_timeout_s", "negotiate_timeout_s",
            "qmp_timeout_s", "agent_timeout_s",
            "handoff_retry_s", "receive_timeout_s", "max_outgoing", "max_incoming", "downtime_limit_ms",
            "cold_boot_wait_s", "total_timeout_per_gib_s", "no_progress_per_gib_s", "reconnect_timeout_s",
            "max_reconnect_timeout_s", "metadata_requests_per_s",
            "max_queued", "queue_retry_s", "max_queue_retry_s",
            "history_max_age_days", "history_max_count", "drain_retry_s", "drain_look_s",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than 0", field=name)
        for name in ("event_notice_s", "event_idle_s", "event_linger_s"):
            if not 0 <= getattr(self, name) < _LONGEST_S:
                raise ConfigError(f"{name} must be between 0 and {_LONGEST_S}", field=name)
        if not 2 <= self.lanes <= 16:  # noqa: PLR2004 - the documented range
            raise ConfigError("lanes must be between 2 and 16", field="lanes")
        if not 4096 <= self.chunk_bytes <= _LARGEST_CHUNK_BYTES or self.chunk_bytes % 4096:  # noqa: PLR2004 - page size
            raise ConfigError("chunk_bytes must be a multiple of 4096, at most 3.5 MiB", field="chunk_bytes")
        if self.window_bytes < self.lanes * min(self.chunk_bytes, _MIB):
            raise ConfigError("window_bytes must hold at least one chunk per lane", field="window_bytes")
        if any(size < 1 for size in self.ready_memory_mib):
            raise ConfigError("ready_memory_mib must hold numbers of at least 1", field="ready_memory_mib")
        if self.compression not in {"auto", "none", "lz4", "zstd"}:
            raise ConfigError("compression must be auto, none, lz4 or zstd", field="compression")
        self._check_convergence()
        if self.max_queue_retry_s < self.queue_retry_s:
            raise ConfigError("max_queue_retry_s must be at least queue_retry_s", field="max_queue_retry_s")
        if self.stop_timeout_s < 0:
            raise ConfigError("stop_timeout_s must not be negative", field="stop_timeout_s")
        if self.log_level not in {"debug", "info", "warning", "error"}:
            raise ConfigError("log_level must be debug, info, warning or error", field="log_level")

    def _check_convergence(self) -> None:
        for name in ("max_bandwidth_bytes_per_s", "switchover_bandwidth_bytes_per_s"):
            if getattr(self, name) and getattr(self, name) < LEAST_BYTES_PER_S:
                raise ConfigError(f"{name} must be 0 or at least {LEAST_BYTES_PER_S}", field=name)
        if self.max_downtime_ms and self.max_downtime_ms < self.downtime_limit_ms:
            raise ConfigError(
                "max_downtime_ms must be 0 or at least downtime_limit_ms", field="max_downtime_ms"
            )
        if self.on_no_convergence not in list(OnNoConvergence):
            raise ConfigError(
                f"on_no_convergence must be one of {', '.join(OnNoConvergence)}", field="on_no_convergence"
            )
        if not 0 <= self.max_throttle_percent <= MAX_THROTTLE_PERCENT:
            raise ConfigError(
                f"max_throttle_percent must be between 0 and {MAX_THROTTLE_PERCENT}",
                field="max_throttle_percent",
            )

    @property
    def journal_dir(self) -> Path:
        """Where the journals of both services lie."""
        return self.state_dir / "journal"

    @property
    def events_dir(self) -> Path:
        """Where the boards of Scheduled Events lie, one for each machine."""
        return self.state_dir / "events"

    @property
    def guests_dir(self) -> Path:
        """Where the metadata service listens for each machine, as NAME.sock."""
        return self.run_dir / "guests"

    @property
    def memory_path(self) -> Path:
        """What the source service remembers besides: its queue and the history of ended migrations."""
        return self.state_dir / "source.sqlite3"

    @property
    def machines_dir(self) -> Path:
        """Where the machines of this host have their folders."""
        return self.run_dir / "machines"

    @property
    def huge_root(self) -> Path | None:
        """``huge_dir``, if this host has one."""
        return self.huge_dir if self.huge_dir != Path() else None

    def admin_target(self, role: str) -> str:
        """Address of a service's admin listener as gRPC spells it; ``role`` is ``source`` or ``dest``."""
        return self._local_target(self.source_admin_listen if role == "source" else self.dest_admin_listen)

    def http_target(self, role: str) -> str:
        """Address of a service's HTTP listener, spelt likewise; empty if it is to have none."""
        return self._local_target(self.source_http_listen if role == "source" else self.dest_http_listen)

    def _local_target(self, value: str) -> str:
        if value.startswith("unix:") and not value.startswith("unix:/"):
            return f"unix:{self.run_dir / value.removeprefix('unix:')}"
        return value


def load_config(path: Path | None) -> HostConfig:
    """Read a configuration file; ``None`` means all defaults.

    Raises:
        ConfigError: the file is missing or not TOML, or a key is unknown or of the wrong type.
    """
    if path is None:
        return HostConfig()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", field="config") from error
    hints = typing.get_type_hints(HostConfig)
    known = {field.name: hints[field.name] for field in dataclasses.fields(HostConfig)}
    return HostConfig(**{key: _typed(key, value, known, path.parent) for key, value in values.items()})


def _typed(key: str, value: object, known: dict[str, type], base: Path) -> typing.Any:
    wanted = known.get(key)
    if wanted is None:
        raise ConfigError(f"unknown setting {key!r}; known are {', '.join(sorted(known))}", field=key)
    if wanted is Path and isinstance(value, str):
        return base / value if value else Path()
    if wanted is float and type(value) is int:
        return float(value)
    if typing.get_origin(wanted) is tuple and isinstance(value, list):
        item = typing.get_args(wanted)[0]
        return tuple(_typed(key, one, {key: item}, base) for one in value)
    if type(value) is not wanted:
        name = "array" if typing.get_origin(wanted) is tuple else wanted.__name__
        raise ConfigError(f"{key} must be of type {name}, not {type(value).__name__}", field=key)
    return value


def render_config(config: HostConfig) -> str:
    """The configuration as a TOML file that :func:`load_config` reads back.

    What is left at its default is not written, so that a release that does not know a setting can read the rest.
    """
    lines = []
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if value != setting.default:
            lines.append(f"{setting.name} = {_rendered(value)}")
    return "\n".join(lines) + "\n"


def _rendered(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_rendered, value))}]"
    if value == Path():
        return '""'
    return f'"{value}"' if isinstance(value, (str, Path)) else str(value)
