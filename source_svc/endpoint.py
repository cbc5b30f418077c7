"""All that the process of ``vmferry-source`` serves, put together: migrations, and the drain that starts them.

Promise: the drain begins nothing before the service has settled what an earlier process left open, and nothing after
it was told to stop.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio

from source_svc.drain_service import DrainService
from source_svc.inside import Inside
from source_svc.service import SourceService
from vmferry.rpc.daemon import Host


class SourceEndpoint:
    """The services of one source."""

    def __init__(self, host: Host) -> None:
        self._migrations = SourceService(host)
        self._drain = DrainService(host, Inside(self._migrations, host.own))

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the methods to a server; returns the full names of the gRPC services."""
        return [*self._migrations.register(server), self._drain.register(server)]

    async def recover(self) -> None:
        """Go on where an earlier process stopped; before the first call."""
        await self._migrations.recover()
        self._drain.resume()

    async def wind_down(self) -> int:
        """Begin nothing new; returns how many migrations still run here. The next start goes on with the drain."""
        await self._drain.stop()
        return await self._migrations.wind_down()

    async def stop(self) -> None:
        """Begin nothing new, and give back what can be given back; calls may still come."""
        await self._drain.stop()
        await self._migrations.stop()

    async def close(self) -> None:
        """Let go of everything; no call comes any more."""
        await self._migrations.close()
