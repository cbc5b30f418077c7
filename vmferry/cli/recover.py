"""``vmferry recover``: what both hosts know of a machine, what each choice risks, and settling what can be settled.

Promise: nothing is done that the services would not do by themselves; with ``--show`` or ``--config`` nothing is done
at all. What cannot be reached is said to be so, never guessed; the exit code tells whether anything is still blocked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import grpc.aio
import typer

from vmferry.cli.connection import CALL_TIMEOUT_S, call_error, check_address, host_identity
from vmferry.cli.machine import directory_of
from vmferry.cli.migrate import MachineArgument
from vmferry.cli.output import JsonOption, as_document, print_document
from vmferry.cli.recovery_view import End, print_ends
from vmferry.config import HostConfig, load_config
from vmferry.errors import (
    ExitCode,
    InvalidArgumentError,
    JournalDamagedError,
    MachineNotFoundError,
    OutcomeUnknownError,
    PeerUnreachableError,
    VmferryError,
)
from vmferry.handoff.blocked import Reason
from vmferry.handoff.ledger import HostLedger
from vmferry.recovery.examination import Examiner
from vmferry.recovery.wire import as_inspection
from vmferry.rpc.tracing import ClientTracingInterceptors
from vmferry.security.identity import Identity
from vmferry.security.tls import TlsFiles, open_channel
from vmferry.v1.recovery_pb2 import InspectMachineRequest, MachineInspection, SettleMachineRequest
from vmferry.v1.recovery_pb2_grpc import RecoveryServiceStub

if TYPE_CHECKING:  # the stub's type exists for checkers only
    from vmferry.v1.recovery_pb2_grpc import RecoveryServiceAsyncStub

_LOOK_S: Final = 10.0
"""Longest wait for a host to say what it knows."""
Request = TypeVar("Request")
Response = TypeVar("Response")


PeerOption = Annotated[
    str,
    typer.Option("--peer", metavar="HOST:PORT", help="A service of the other host, if it is not known here."),
]
PeerHostOption = Annotated[
    str,
    typer.Option("--peer-host", metavar="URI", help="Who must answer there, if the attempt does not say."),
]
ShowOption = Annotated[bool, typer.Option("--show", help="Change nothing, only show.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Read this host's journals without a service; changes nothing."
    ),
]
# Unlike those of other commands, these may be missing: --config needs no service.
SourceOption = Annotated[
    str,
    typer.Option(
        "--source",
        envvar="VMFERRY_SOURCE",
        metavar="HOST:PORT",
        help="The source (or destination) service of the host.",
    ),
]
SourceHostOption = Annotated[
    str,
    typer.Option(
        "--source-host",
        envvar="VMFERRY_SOURCE_HOST",
        metavar="URI",
        help="Identity its certificate must carry: spiffe://DOMAIN/vmhost/NAME.",
    ),
]
TlsOption = Annotated[
    Path | None,
    typer.Option(
        "--tls", envvar="VMFERRY_TLS", metavar="DIR", help="Own certificates: ca.pem, tls.crt, tls.key."
    ),
]


@dataclass(frozen=True)
class Asked:
    """Whom to ask, as the options say."""

    source: str
    source_host: str
    tls: Path | None
    peer: str
    peer_host: str


@dataclass
class Host:
    """An open connection to one host's service, and what came of asking it."""

    end: End
    expected: Identity
    stub: RecoveryServiceAsyncStub
    done: list[str] = field(default_factory=list)

    async def look(self, machine: str) -> MachineInspection:
        """Have it say all it knows."""
        answer = await self._call(self.stub.InspectMachine, InspectMachineRequest(machine=machine), _LOOK_S)
        self.end.inspection = answer.inspection
        return answer.inspection

    async def settle(self, machine: str) -> bool:
        """Have it try now what it would try next; returns whether it did anything."""
        answer = await self._call(
            self.stub.SettleMachine, SettleMachineRequest(machine=machine), CALL_TIMEOUT_S
        )
        self.end.inspection = answer.inspection
        self.end.done += [text for text in answer.done if text not in self.end.done]
        return bool(answer.done)

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request, timeout_s: float
    ) -> Response:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.expected) from error


def recover(
    *,
    machine: MachineArgument,
    peer: PeerOption = "",
    peer_host: PeerHostOption = "",
    show: ShowOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    source: SourceOption = "",
    source_host: SourceHostOption = "",
    tls: TlsOption = None,
) -> None:
    """Show what both hosts know of a machine and settle what can be settled; exit code 6 while it is unknown."""
    asked = Asked(source, source_host, tls, peer, peer_host)
    if peer:
        check_address(peer, field="--peer")
    if config is not None:
        ends = asyncio.run(_without_service(machine, load_config(config), asked))
    else:
        _require(asked)
        ends = asyncio.run(_with_services(machine, asked, show=show))
    code = exit_code(ends)
    if json:
        print_document(_document(ends, code))
    else:
        print_ends(ends)
    raise typer.Exit(code)


def exit_code(ends: list[End]) -> ExitCode:
    """0 if nothing is blocked on any host that could be asked; 6 while it is not known whose the machine will be."""
    reasons = {end.inspection.machine.blockage.reason for end in ends if end.inspection is not None} - {""}
    if not reasons:
        return ExitCode.OK
    known = {reason.value for reason in Reason if reason.is_known}
    return ExitCode.FAILED if reasons <= known else OutcomeUnknownError.exit_code


def _require(asked: Asked) -> None:
    missing = {"--source": asked.source, "--source-host": asked.source_host, "--tls": asked.tls}
    for name, value in missing.items():
        if not value:
            raise InvalidArgumentError(
                f"{name} is missing",
                field=name,
                remedy="Give it, or on the host itself: --config FILE, which needs no service.",
            )


async def _with_services(machine: str, asked: Asked, *, show: bool) -> list[End]:
    ends: list[End] = []
    async with contextlib.AsyncExitStack() as stack:
        here = await stack.enter_async_context(
            _open(asked.source, asked.source_host, asked.tls, "here", field="--source")
        )
        ends.append(here.end)
        try:
            seen = await here.look(machine)
        except PeerUnreachableError as error:
            raise PeerUnreachableError(
                f"the service at {asked.source} does not answer: {error.message}",
                remedy=f"On that host, without a service: vmferry recover {machine} --config FILE",
            ) from error
        there = await _peer_of(seen, asked, stack, ends)
        machine_id = seen.machine.uuid
        if there is not None:
            await _if_it_can(there, there.look(machine_id))
        if not show:
            await _settle(machine_id, here, there)
    return ends


async def _settle(machine_id: str, here: Host, there: Host | None) -> None:
    """Both in turn; the second may have what the first waits for."""
    await here.settle(machine_id)
    if there is None or there.end.inspection is None:
        return
    moved = False
    with contextlib.suppress(MachineNotFoundError):
        moved = bool(await _if_it_can(there, there.settle(machine_id)))
    if moved and here.end.inspection is not None and here.end.inspection.machine.HasField("blockage"):
        await here.settle(machine_id)
    # What one did is news to the other.
    await here.look(machine_id)
    await _if_it_can(there, there.look(machine_id))


async def _if_it_can(host: Host, call: Any) -> Any:
    """The other host's answer; that it has none is a finding and no failure."""
    try:
        return await call
    except VmferryError as error:
        host.end.error = error
        return None


async def _peer_of(
    seen: MachineInspection, asked: Asked, stack: contextlib.AsyncExitStack, ends: list[End]
) -> Host | None:
    """The other host of the attempt, if it is known how to reach it."""
    uri, address = asked.peer_host or seen.peer.host, asked.peer or seen.peer.address
    if not uri and not address:
        return None
    end = End("there", address, uri)
    ends.append(end)
    if not address or not uri or asked.tls is None:
        end.missing = "--tls" if asked.tls is None else "--peer" if not address else "--peer-host"
        return None
    host = await stack.enter_async_context(_open(address, uri, asked.tls, "there", field="--peer"))
    ends[-1] = host.end
    return host


@contextlib.asynccontextmanager
async def _open(address: str, uri: str, tls: Path | None, who: str, *, field: str) -> AsyncIterator[Host]:
    assert tls is not None
    check_address(address, field=field)
    expected = host_identity(uri, field=f"{field}-host")
    material = TlsFiles(tls).load()
    async with open_channel(address, expected, material, interceptors=ClientTracingInterceptors()) as channel:
        yield Host(End(who, address, uri), expected, RecoveryServiceStub(channel))


# Without a service


async def _without_service(machine: str, config: HostConfig, asked: Asked) -> list[End]:
    examiner = Examiner(directory_of(config), config.journal_dir, _ledger(config))
    known = await examiner.find(machine)
    end = End("here", "", _own_uri(config))
    end.inspection = as_inspection(known, examiner, host=end.host)
    ends = [end]
    async with contextlib.AsyncExitStack() as stack:
        there = await _peer_of(end.inspection, asked, stack, ends)
        if there is not None:
            await _if_it_can(there, there.look(known.machine_id))
    return ends


def _ledger(config: HostConfig) -> HostLedger | str:
    """Who reads this host's journals, or why they cannot be believed; nothing is made that is not there."""
    if not (config.journal_dir / "register").exists():
        return f"{config.journal_dir} has no register: these are not the journals of a service of this host"
    try:
        return HostLedger(config.journal_dir)
    except (JournalDamagedError, OSError) as error:
        return str(error)


def _own_uri(config: HostConfig) -> str:
    """Who this host is, if its certificate can be read: an expired one may be why no service starts."""
    try:
        return TlsFiles(config.tls_dir).load().identity.uri
    except VmferryError:
        return ""


def _document(ends: list[End], code: ExitCode) -> dict[str, Any]:
    seen = [end.inspection for end in ends if end.inspection is not None]
    return {
        "machine": next((one.machine.name for one in seen if one.machine.name), ""),
        "uuid": seen[0].machine.uuid,
        "blocked": code is not ExitCode.OK,
        "exit_code": int(code),
        "ends": [
            {
                "who": end.who,
                "host": end.host,
                "address": end.address,
                "error": {"reason": end.error.reason, "message": end.error.message} if end.error else None,
                "done": end.done,
                "inspection": as_document(end.inspection) if end.inspection is not None else None,
            }
            for end in ends
        ],
    }
