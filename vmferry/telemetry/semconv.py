"""Names of metrics and attributes, in one place because the conventions for RPC are still being renamed.

Promise: every attribute name that OpenTelemetry defines and vmferry uses stands here, as in the semantic conventions
for RPC (release candidate, August 2026); our own names all begin with :data:`PREFIX`.
"""

from __future__ import annotations

from typing import Final

SERVICE_NAME: Final = "service.name"
SERVICE_VERSION: Final = "service.version"
HOST_NAME: Final = "host.name"
PROCESS_PID: Final = "process.pid"

RPC_SYSTEM_NAME: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_STATUS_CODE: Final = "rpc.response.status_code"
NETWORK_PEER_ADDRESS: Final = "network.peer.address"
NETWORK_PEER_PORT: Final = "network.peer.port"
ERROR_TYPE: Final = "error.type"

GRPC: Final = "grpc"
"""Value of :data:`RPC_SYSTEM_NAME`."""

PREFIX: Final = "vmferry."
"""Begins the name of every attribute that OpenTelemetry does not define."""

PREDICTION_TOTAL_ERROR: Final = "vmferry.prediction.total_error"
PREDICTION_DOWNTIME_ERROR: Final = "vmferry.prediction.downtime_error"
MACHINE_KIND: Final = "vmferry.kind"
MACHINES_BLOCKED: Final = "vmferry.machines.blocked"

OUTCOME: Final = "vmferry.outcome"
REASON: Final = "vmferry.reason"
PHASE: Final = "vmferry.phase"
PATH: Final = "vmferry.path"
DESTINATION: Final = "vmferry.destination"
CALL: Final = "vmferry.call"
MACHINE: Final = "vmferry.machine"
STATE: Final = "vmferry.state"
METHOD: Final = "vmferry.method"
