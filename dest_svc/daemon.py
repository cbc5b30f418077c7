"""Puts the destination service together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc

from dest_svc.service import DestinationService
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.memory.probe import probe_trackers
from vmferry.rpc.daemon import Daemon
from vmferry.rpc.server import start_server
from vmferry.security.tls import server_credentials
from vmferry.v1 import handoff_pb2, handoff_pb2_grpc

_GRACE_S: Final = 2.0


async def serve(daemon: Daemon) -> None:
    """Recover, listen, and run until told to stop."""
    config = daemon.config
    ledger = HostLedger(config.journal_dir)
    lock = ledger.lock_role(Role.DESTINATION)
    trackers = await asyncio.to_thread(probe_trackers)
    service = DestinationService(config, ledger, daemon.tls, trackers, daemon.broken)

    def add(server: grpc.aio.Server) -> Sequence[str]:
        handoff_pb2_grpc.add_DestinationServiceServicer_to_server(service, server)
        return [handoff_pb2.DESCRIPTOR.services_by_name["DestinationService"].full_name]

    try:
        await service.recover()
        servers = await start_server(
            listen=config.dest_listen,
            credentials=server_credentials(daemon.tls),
            own=daemon.own,
            services=add,
            admin_target=config.admin_target("dest"),
            role="dest",
        )
        daemon.ready(servers)
        await daemon.stop.wait()
        await servers.stop(_GRACE_S)
    finally:
        await service.close()
        lock.close()
