"""``vmferry-host``: both services of a host below one process, for a container whose first process it is.

Promise: a service that ends is started again, after a pause that grows while it keeps ending, and so is one whose
event loop stands, so that it says nothing on the socket it was given. The machines it started live on: they become
children of this process, which also collects whatever else ends below it. Being told to stop, it tells both services
and waits for them. Only what cannot start at all, such as a wrong configuration, ends it by itself, and then with
that service's exit code: later its end would take every machine of the container along.

It knows neither gRPC nor an event loop, so that nothing that fails in a service can fail here.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.config import HostConfig, load_config
from vmferry.errors import ConfigError, VmferryError

MODULES: Final = {"source": "source_svc", "dest": "dest_svc"}
SHORTEST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 15.0
STEADY_S: Final = 30.0
"""A service that has run for so long may end again without the next pause being longer."""
FIRST_START_S: Final = 15.0
"""A service that fails within so long of the very first start will not do better by being repeated."""
SLACK_S: Final = 20.0
"""What a stop may take beyond the time that running migrations are given."""
WATCHDOG_S: Final = 30.0
"""A service that says nothing for so long hangs."""
LOOK_S: Final = 1.0
"""How often what services say is looked at."""
_US: Final = 1_000_000
_LONGEST_MESSAGE: Final = 4096
_HEARD: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})


@dataclass
class Child:
    """One service."""

    role: str
    command: list[str]
    notify: socket.socket
    """Where it says that it lives, by the protocol of service managers."""
    pid: int = 0
    """Its process; 0 while there is none."""
    started_at: float = 0.0
    pause_s: float = 0.0
    due: float = 0.0
    """When it is to be started."""
    fed_at: float = 0.0
    """When it last said that it lives; 0 before it has."""

    def start(self, now: float, watchdog_s: float) -> None:
        """Start it; it hears all signals, whatever this process blocks."""
        self.listen(now)  # what the one before has said is not this one's
        told = {"NOTIFY_SOCKET": self.notify.getsockname(), "WATCHDOG_USEC": str(int(watchdog_s * _US))}
        self.pid = os.posix_spawn(self.command[0], self.command, os.environ | told, setsigmask=[])
        self.started_at, self.fed_at = now, 0.0
        _say("info", "service started", role=self.role, pid=self.pid)

    def ended(self, now: float) -> None:
        """Plan its next start."""
        if now - self.started_at >= STEADY_S:
            self.pause_s = 0.0
        self.pid = 0
        self.due = now + self.pause_s
        self.pause_s = min(max(SHORTEST_PAUSE_S, 2 * self.pause_s), LONGEST_PAUSE_S)

    def listen(self, now: float) -> None:
        """Take what it has said since the last look."""
        while True:
            try:
                said = self.notify.recv(_LONGEST_MESSAGE)
            except BlockingIOError:
                return
            if b"WATCHDOG=1" in said.splitlines():
                self.fed_at = now

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal. Until it is reaped, which only happens here, its number is its own."""
        if self.pid:
            os.kill(self.pid, number)


class Supervisor:
    """Keeps the services of a host running until told to stop."""

    def __init__(
        self, children: list[Child], *, stop_timeout_s: float, watchdog_s: float = WATCHDOG_S
    ) -> None:
        self._children = children
        self._watchdog_s = watchdog_s
        self._looked_at = time.monotonic()
        self._stop_timeout_s = stop_timeout_s
        self._began = time.monotonic()
        self._deadline: float | None = None
        """When services that were told to stop are ended by force."""
        self._exit_code = 0

    def run(self) -> int:
        """Run until stopped; returns the exit code."""
        # Blocked, not handled: between looking and waiting, no signal is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        while self._deadline is None or any(child.pid for child in self._children):
            now = time.monotonic()
            if self._deadline is None:
                for child in self._children:
                    if not child.pid and now >= child.due:
                        child.start(now, self._watchdog_s)
            elif now >= self._deadline:
                self._tell(signal.SIGKILL)
            heard = signal.sigtimedwait(_HEARD, self._longest_wait_s(now))
            if heard is not None:
                self._hear(signal.Signals(heard.si_signo))
            self._reap()
            self._end_those_that_hang()
        return self._exit_code

    def _longest_wait_s(self, now: float) -> float:
        moments = [now + min(LOOK_S, self._watchdog_s / 4)]
        if self._deadline is not None:
            moments.append(self._deadline)
        else:
            moments += [child.due for child in self._children if not child.pid]
        return max(0.01, min(moments) - now)

    def _hear(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP:
            self._tell(signal.SIGHUP)
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._stop()

    def _stop(self) -> None:
        if self._deadline is None:
            _say("info", "stopping", within_s=self._stop_timeout_s)
            self._deadline = time.monotonic() + self._stop_timeout_s
        self._tell(signal.SIGTERM)

    def _tell(self, number: signal.Signals) -> None:
        for child in self._children:
            child.tell(number)

    def _end_those_that_hang(self) -> None:
        now = time.monotonic()
        stood = now - self._looked_at > self._watchdog_s / 2
        self._looked_at = now
        for child in self._children:
            child.listen(now)
            if child.fed_at and stood:  # not it, but all of this container, was halted
                child.fed_at = now
            if child.pid and child.fed_at and now - child.fed_at > self._watchdog_s:
                _say("error", "a service hangs and is ended", role=child.role, pid=child.pid)
                child.fed_at = 0.0
                child.tell(signal.SIGKILL)

    def _reap(self) -> None:
        """Collect everything that has ended: services, and orphans such as machines whose service went first."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for child in self._children:
                if child.pid == pid:
                    self._service_ended(child, os.waitstatus_to_exitcode(status))

    def _service_ended(self, child: Child, code: int) -> None:
        now = time.monotonic()
        child.ended(now)
        if self._deadline is not None:
            _say("info", "service ended", role=child.role, code=code)
        elif code > 0 and now - self._began < FIRST_START_S:
            _say("critical", "a service cannot start", role=child.role, code=code)
            self._exit_code = code
            self._stop()
        else:
            _say("error", "a service ended and is started again", role=child.role, code=code)


def main() -> None:
    """Run until stopped."""
    parser = argparse.ArgumentParser(prog="vmferry-host", description="Both services of a vmferry host.")
    parser.add_argument("--config", type=Path, help="configuration file of this host (TOML)")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config)
        children = _children(config, arguments.config)
    except VmferryError as error:
        sys.stderr.write(f"vmferry-host: {error.message}. {error.instance_remedy}\n")
        sys.exit(int(error.exit_code))
    sys.exit(Supervisor(children, stop_timeout_s=config.stop_timeout_s + SLACK_S).run())


def _children(config: HostConfig, config_file: Path | None) -> list[Child]:
    """Both services, not started yet, and the folders that they need."""
    options = [] if config_file is None else ["--config", str(config_file)]
    children = []
    try:
        for folder in (config.state_dir, config.run_dir):  # on volumes and memory that begin empty
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for role, module in sorted(MODULES.items()):
            listening = notify_socket(config.run_dir / f"{role}-notify.sock")
            children.append(Child(role, [sys.executable, "-m", module, *options], listening))
    except OSError as error:
        raise ConfigError(
            f"cannot use {error.filename or config.run_dir}: {error.strerror or error}",
            remedy=f"Give state_dir and run_dir to the user with the number {os.getuid()}.",
        ) from error
    return children


def notify_socket(path: Path) -> socket.socket:
    """A socket on which a service says that it lives; only this user can write to it."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.setblocking(False)
    before = os.umask(0o177)
    try:
        listening.bind(os.fspath(path))
    finally:
        os.umask(before)
    return listening


def _say(level: str, event: str, **fields: object) -> None:
    """One line of the log, as the services write theirs."""
    now = dt.datetime.now(dt.UTC).isoformat().replace("+00:00", "Z")
    line = {**fields, "event": event, "level": level, "logger": __name__, "timestamp": now}
    sys.stderr.write(f"{json.dumps(line)}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
