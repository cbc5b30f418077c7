"""A source service for the command line to talk to: real TLS and real stubs, with a script instead of machines."""

# ruff: noqa: N802, ARG002 - names and parameters of a servicer's methods are gRPC's
from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent import futures
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from vmferry.errors import (
    MachineNotFoundError,
    MigrationNotFoundError,
    PointOfNoReturnError,
    ServiceStoppingError,
    VmferryError,
)
from vmferry.rpc.status import to_grpc_status
from vmferry.security.identity import Identity
from vmferry.security.tickets import VerifiedTicket, open_ticket
from vmferry.security.tls import SERVER_OPTIONS, TlsFiles, server_credentials
from vmferry.v1 import compatibility_pb2, machine_pb2, migration_pb2
from vmferry.v1.migration_pb2_grpc import SourceServiceServicer, add_SourceServiceServicer_to_server

MIB = 1024 * 1024
MACHINE_ID = "6d0c3f5e-7a38-4a51-9a57-0f3e6a1c9b11"
MIGRATION_ID = "00112233445566778899aabbccddeeff"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
HOST_A = "spiffe://test.example/vmhost/a"
HOST_B = "spiffe://test.example/vmhost/b"


class FakeSource(SourceServiceServicer):
    """Answers as its attributes say.

    Attributes:
        script: what WatchMigration sends; an error ends the stream, and the next call goes on behind it.
        lost_answers: how many calls of StartMigration end as if the service were away, after being carried out.
        requests: what came in, newest last.
        updates: what UpdateMigration answers with, in turn, before it answers with the migration.
        resumed: the tokens that WatchMigration was called with.
    """

    def __init__(self, tls_dir: Path) -> None:
        material = TlsFiles(tls_dir).load()
        self._ca_pem = material.ca_pem
        self.script: list[migration_pb2.Migration | VmferryError] = []
        self.lost_answers = 0
        self.away = ServiceStoppingError("the service is stopping")
        self.resumed: list[str] = []
        self.updates: list[migration_pb2.Migration | VmferryError] = []
        self.migrations = [migration(), migration(outcome=migration_pb2.MIGRATION_OUTCOME_COMPLETED)]
        self.report = compatibility_pb2.CompatibilityReport(
            compatible=True, protocol_version=1, tracker="pagemap-scan"
        )
        self.requests: list[Any] = []
        self.tickets: list[VerifiedTicket] = []
        self.traceparents: list[str] = []
        self.machine = machine_pb2.Machine(
            name="web-1",
            uuid=MACHINE_ID,
            spec=machine_pb2.MachineSpec(
                version=1,
                name="web-1",
                uuid=MACHINE_ID,
                kind="microvm",
                memory_mib=64,
                vcpus=1,
                microvm=machine_pb2.MicrovmSpec(program="canary"),
            ),
            state=machine_pb2.MACHINE_STATE_RUNNING,
            right=machine_pb2.MACHINE_RIGHT_OWNED,
            epoch=1,
            pid=4711,
        )
        self._position = 0
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=SERVER_OPTIONS)
        add_SourceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_secure_port("127.0.0.1:0", server_credentials(TlsFiles(tls_dir)))
        self._server.start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """End it."""
        self._server.stop(0).wait()

    def GetMachine(self, request: Any, context: Any) -> Any:
        self._find(request.machine, context)
        return migration_pb2.GetMachineResponse(machine=self.machine)

    def ListMachines(self, request: Any, context: Any) -> Any:
        return migration_pb2.ListMachinesResponse(machines=[self.machine])

    def PlanMigration(self, request: Any, context: Any) -> Any:
        self._find(request.machine, context)
        self.requests.append(request)
        return migration_pb2.PlanMigrationResponse(report=self.report)

    def StartMigration(self, request: Any, context: Any) -> Any:
        self._find(request.machine, context)
        known = {earlier.request_id for earlier in self.requests}
        self.requests.append(request)
        metadata = dict(context.invocation_metadata())
        self.traceparents.append(metadata.get("traceparent", ""))
        if request.request_id not in known:
            try:
                ticket = open_ticket(request.ticket, ca_pem=self._ca_pem, now=datetime.now(UTC))
            except VmferryError as error:
                _abort(context, error)
            ticket.check(
                machine_id=MACHINE_ID,
                source=Identity.parse(HOST_A),
                destination=Identity.parse(request.destination.host),
                memory_bytes=64 * MIB,
                vcpus=1,
                source_key_sha256=None,
            )
            self.tickets.append(ticket)
        if self.lost_answers:
            self.lost_answers -= 1
            _abort(context, ServiceStoppingError("the service is stopping"))
        return migration_pb2.StartMigrationResponse(migration=migration(request_id=request.request_id))

    def GetMigration(self, request: Any, context: Any) -> Any:
        self._find_migration(request.id, context)
        return migration_pb2.GetMigrationResponse(migration=self.migrations[0])

    def ListMigrations(self, request: Any, context: Any) -> Any:
        """One migration to a page, so that callers must go on."""
        self.requests.append(migration_pb2.ListMigrationsRequest.FromString(request.SerializeToString()))
        found = [
            item
            for item in self.migrations
            if not request.open_only or item.phase != migration_pb2.MIGRATION_PHASE_ENDED
        ]
        start = int(request.page_token or "0")
        more = str(start + 1) if start + 1 < len(found) else ""
        return migration_pb2.ListMigrationsResponse(migrations=found[start : start + 1], next_page_token=more)

    def WatchMigration(self, request: Any, context: Any) -> Iterator[Any]:
        self._find_migration(request.id, context)
        self.resumed.append(request.resume_token)
        while self._position < len(self.script):
            item = self.script[self._position]
            self._position += 1
            if isinstance(item, VmferryError):
                _abort(context, item)
            yield migration_pb2.WatchMigrationResponse(migration=item, resume_token=f"token-{self._position}")
        last = self.script[-1] if self.script else None
        ended = (
            isinstance(last, migration_pb2.Migration) and last.phase == migration_pb2.MIGRATION_PHASE_ENDED
        )
        while not ended and context.is_active():  # a watch of what has not ended stays open
            time.sleep(0.01)

    def CancelMigration(self, request: Any, context: Any) -> Any:
        self._find_migration(request.id, context)
        if self.migrations[0].phase == migration_pb2.MIGRATION_PHASE_HANDING_OFF:
            _abort(context, PointOfNoReturnError("the hand-off has begun"))
        return migration_pb2.CancelMigrationResponse(migration=self.migrations[0])

    def SwitchNow(self, request: Any, context: Any) -> Any:
        self._find_migration(request.id, context)
        return migration_pb2.SwitchNowResponse(migration=self.migrations[0])

    def UpdateMigration(self, request: Any, context: Any) -> Any:
        self._find_migration(request.id, context)
        self.requests.append(request)
        answer = self.updates.pop(0) if self.updates else self.migrations[0]
        if isinstance(answer, VmferryError):
            _abort(context, answer)
        return migration_pb2.UpdateMigrationResponse(migration=answer)

    def _find(self, name: str, context: Any) -> None:
        if name not in ("web-1", MACHINE_ID):
            _abort(context, MachineNotFoundError(f"no machine {name!r} on this host", field="machine"))

    def _find_migration(self, name: str, context: Any) -> None:
        if name != MIGRATION_ID:
            _abort(context, MigrationNotFoundError(f"no migration {name!r}", field="id"))


def migration(
    *,
    phase: migration_pb2.MigrationPhase.ValueType = migration_pb2.MIGRATION_PHASE_PRECOPYING,
    outcome: migration_pb2.MigrationOutcome.ValueType = migration_pb2.MIGRATION_OUTCOME_UNSPECIFIED,
    reason: VmferryError | None = None,
    current_round: int = 1,
    remaining: int = 40 * MIB,
    request_id: str = "",
) -> migration_pb2.Migration:
    """A migration as a source would report it; one with an outcome other than unknown has ended."""
    ended = outcome not in (
        migration_pb2.MIGRATION_OUTCOME_UNSPECIFIED,
        migration_pb2.MIGRATION_OUTCOME_UNKNOWN,
    )
    made = migration_pb2.Migration(
        id=MIGRATION_ID,
        machine="web-1",
        machine_id=MACHINE_ID,
        source=HOST_A,
        destination=migration_pb2.Destination(host=HOST_B, address="127.0.0.1:1"),
        phase=migration_pb2.MIGRATION_PHASE_ENDED if ended else phase,
        outcome=outcome,
        progress=migration_pb2.MigrationProgress(
            round=current_round,
            memory_bytes=64 * MIB,
            sent_bytes=24 * MIB,
            wire_bytes=25 * MIB,
            remaining_bytes=remaining,
            bytes_per_second=400.0 * MIB,
            dirty_bytes_per_second=20.0 * MIB,
        ),
        trace_id=TRACE_ID,
        tracker="pagemap-scan",
        owner=HOST_B if outcome == migration_pb2.MIGRATION_OUTCOME_COMPLETED else HOST_A,
    )
    made.progress.expected_downtime.FromMilliseconds(12)
    made.progress.eta.FromMilliseconds(1400)
    made.create_time.FromJsonString("2026-11-20T10:00:00Z")
    if ended:
        made.downtime.FromMicroseconds(12_345)
        made.total.FromMilliseconds(2500)
    if reason is not None:
        made.reason.reason, made.reason.message = reason.reason, reason.message
        made.reason.remedy = reason.instance_remedy
    if request_id:
        uuid.UUID(request_id)
    return made


def _abort(context: Any, error: VmferryError) -> None:
    context.abort_with_status(to_grpc_status(error))


def prediction() -> compatibility_pb2.Prediction:
    """A prediction as a source would report it."""
    made = compatibility_pb2.Prediction(
        converges=True,
        rounds=4,
        dirty_bytes_per_second=20.0 * MIB,
        dirty_error_bytes_per_second=1.0 * MIB,
        link_bytes_per_second=400.0 * MIB,
        link_error_bytes_per_second=10.0 * MIB,
        reserve_bytes_per_second=2048.0 * MIB,
        resident_bytes=64 * MIB,
    )
    made.sampled.FromMilliseconds(500)
    for length, (expected, low, high) in ((made.total, (2000, 1500, 3000)), (made.downtime, (40, 30, 60))):
        length.expected.FromMilliseconds(expected)
        length.low.FromMilliseconds(low)
        length.high.FromMilliseconds(high)
    return made
