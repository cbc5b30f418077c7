"""Whether a machine may come: the ticket and the fields of a call, the description, and the machine's files.

Promise: a source that asks beforehand is told the very list that is enforced when it begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from dest_svc.admission import Refusal, refusals
from dest_svc.files import file_refusals
from vmferry.config import HostConfig
from vmferry.drain.record import DrainFile
from vmferry.errors import InvalidArgumentError
from vmferry.handoff.states import Attempt
from vmferry.machines.fileidentity import Contents
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_from_message
from vmferry.negotiation.encodings import ENCODINGS
from vmferry.negotiation.facts import Network
from vmferry.negotiation.path import path_problem
from vmferry.negotiation.report import PROTOCOL_VERSIONS
from vmferry.rpc.daemon import Host
from vmferry.rpc.interceptors import current_caller, current_caller_key
from vmferry.security.tickets import VerifiedTicket
from vmferry.security.warrants import open_permission
from vmferry.v1 import compatibility_pb2, handoff_pb2

_MIB: Final = 1024 * 1024


class Judge:
    """What this host has against machines."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._contents = Contents()
        self._drain = DrainFile(config.state_dir)

    @property
    def draining(self) -> bool:
        """Whether this host takes no newcomers: by its configuration, or because it is being emptied."""
        return self._config.draining or self._drain.draining

    async def against(
        self,
        spec: MachineSpec,
        files: Iterable[compatibility_pb2.FileIdentity],
        networks: Iterable[compatibility_pb2.NetworkIdentity] = (),
    ) -> list[Refusal]:
        """Everything against one machine, whose files and interfaces are like this at its source; takes a moment."""
        at_source = {one.tap: Network(one.tap, one.bridge, one.mtu_bytes) for one in networks}
        found = await asyncio.to_thread(list, refusals(spec, self._config, at_source))
        return found + await file_refusals(spec, files, self._config, self._contents)


def check_begin(
    request: handoff_pb2.BeginRequest, attempt: Attempt, host: Host
) -> tuple[MachineSpec, VerifiedTicket]:
    """What a call that begins an attempt asks for, if its ticket and its fields allow it."""
    tls = host.tls.load()
    spec = spec_from_message(request.spec)
    memory_bytes = spec.memory_bytes
    ticket = open_permission(request.ticket, ca_pem=tls.ca_pem, now=datetime.now(UTC))
    ticket.check(
        machine_id=attempt.machine_id,
        source=current_caller(),
        destination=host.own,
        memory_bytes=memory_bytes,
        vcpus=spec.vcpus,
        source_key_sha256=current_caller_key(),
        destination_key_sha256=tls.key_sha256,
    )
    if ticket.migration_id != attempt.migration_id:
        raise InvalidArgumentError("the ticket is for another migration", field="attempt.migration_id")
    if spec.uuid != attempt.machine_id:
        raise InvalidArgumentError("the description is of another machine", field="spec.uuid")
    if request.protocol_version not in PROTOCOL_VERSIONS:
        raise InvalidArgumentError("this host does not speak that version", field="protocol_version")
    if not 2 <= request.lanes <= 16:  # noqa: PLR2004 - the documented range
        raise InvalidArgumentError("lanes must be between 2 and 16", field="lanes")
    if [(region.name, region.size_bytes) for region in request.regions] != [("ram", memory_bytes)]:
        raise InvalidArgumentError(
            "regions must be one, 'ram', of the machine's memory size", field="regions"
        )
    if not set(request.encodings) <= set(ENCODINGS):
        raise InvalidArgumentError(f"encodings may be {', '.join(ENCODINGS)}", field="encodings")
    problem = path_problem(request.path, spec.kind, request.protocol_version, shared=spec.shared_memory)
    if problem:
        raise InvalidArgumentError(problem, field="path")
    return spec, ticket
