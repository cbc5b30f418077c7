"""The same client for programs that do not use asyncio: each call waits for its answer.

Promise: one thread of its own runs the connection; whoever leaves the ``with`` block leaves no thread behind. It does
not go with a program that itself runs gRPC on an event loop: gRPC wants one loop to a process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from vmferry.client.places import Target
from vmferry.client.source import SourceClient
from vmferry.client.updating import Wanted
from vmferry.client.watching import PATIENCE, Patience
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.compatibility_pb2 import CompatibilityReport
from vmferry.v1.drain_pb2 import Drain
from vmferry.v1.machine_pb2 import Machine
from vmferry.v1.update_pb2 import CheckUpdateResponse, Update

Result = TypeVar("Result")


class BlockingSourceClient:
    """An open connection to a source service, in a ``with`` block.

    Raises:
        InvalidArgumentError: address or host have the wrong form.
        ConfigError: the certificates are missing or unusable.
    """

    def __init__(self, address: str, host: str, tls_dir: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vmferry-client", daemon=True)
        self._opening = SourceClient.open(address, host, tls_dir)
        self._client: SourceClient

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._client = self.run(self._opening.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self._opening.__aexit__(None, None, None))
        finally:
            self._end()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for a call of the other client, for what has no method here."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in this thread ends the call in the other
            raise

    def get_machine(self, machine: str) -> Machine:
        """A machine by name or UUID."""
        return self.run(self._client.get_machine(machine))

    def list_machines(self) -> list[Machine]:
        """All machines on the host."""
        return self.run(self._client.list_machines())

    def plan(
        self, machine: str, to: Target, *, options: pb.MigrationOptions | None = None, predict: bool = True
    ) -> CompatibilityReport:
        """Whether a machine could move, and how long it would take; changes nothing."""
        return self.run(self._client.plan(machine, to, options=options, predict=predict))

    def start(
        self, machine: str, to: Target, *, options: pb.MigrationOptions | None = None, request_id: str = ""
    ) -> pb.Migration:
        """Start a migration; at most one begins, however often the answer is lost."""
        return self.run(self._client.start(machine, to, options=options, request_id=request_id))

    def migrate(
        self,
        machine: str,
        to: Target,
        *,
        options: pb.MigrationOptions | None = None,
        request_id: str = "",
        patience: Patience = PATIENCE,
    ) -> pb.Migration:
        """Move a machine; returns how it came out, and raises nothing because it came out badly."""
        work = self._client.migrate(machine, to, options=options, request_id=request_id, patience=patience)
        return self.run(work)

    def wait(
        self,
        migration_id: str,
        *,
        show: Callable[[pb.Migration], None] = lambda _: None,
        patience: Patience = PATIENCE,
    ) -> pb.Migration:
        """The migration when it has ended, or has stayed unknown; ``show`` gets each state (in another thread)."""
        return self.run(self._client.wait(migration_id, show=show, patience=patience))

    def get_migration(self, migration_id: str) -> pb.Migration:
        """A migration as it stands."""
        return self.run(self._client.get_migration(migration_id))

    def history(self, *, machine: str = "", open_only: bool = False) -> list[pb.Migration]:
        """The migrations that the host knows, newest first."""
        return self.run(self._client.history(machine=machine, open_only=open_only))

    def cancel(self, migration_id: str) -> pb.Migration:
        """Cancel a migration whose hand-off has not begun."""
        return self.run(self._client.cancel(migration_id))

    def switch_now(self, migration_id: str) -> pb.Migration:
        """Have the guest paused after this round, whatever the pause."""
        return self.run(self._client.switch_now(migration_id))

    def drain(
        self, to: Sequence[Target], *, options: pb.MigrationOptions | None = None, request_id: str = ""
    ) -> Drain:
        """Have the host take no newcomers and move its machines to these hosts."""
        return self.run(self._client.drain(to, options=options, request_id=request_id))

    def undrain(self) -> Drain:
        """Have the host take newcomers again."""
        return self.run(self._client.undrain())

    def get_drain(self) -> Drain:
        """How the host's drain stands, or stood."""
        return self.run(self._client.get_drain())

    def check_update(self, wanted: Wanted) -> CheckUpdateResponse:
        """What stands in the way of an update in place; changes nothing."""
        return self.run(self._client.check_update(wanted))

    def update_in_place(self, wanted: Wanted, *, request_id: str = "") -> Update:
        """Replace the process that runs a machine, and wait until that has ended."""
        return self.run(self._client.update_in_place(wanted, request_id=request_id))

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
