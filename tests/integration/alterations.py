"""A destination whose answers are those of a real one, changed on their way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest

from tests.integration.hosts import World
from tests.integration.services import DEADLINE_S
from vmferry.security.tls import TlsFiles, open_channel, server_credentials
from vmferry.v1 import handoff_pb2
from vmferry.v1.handoff_pb2_grpc import (
    DestinationServiceServicer,
    DestinationServiceStub,
    add_DestinationServiceServicer_to_server,
)

Answer = handoff_pb2.NegotiateResponse
Change = Callable[[Answer], object]


class Altered(DestinationServiceServicer):
    """Asks host b, and changes what it says."""

    def __init__(self, world: World) -> None:
        self.change: Change = lambda _answer: None
        self.address = ""
        self._world = world

    async def Negotiate(  # noqa: N802 - named by the contract
        self, request: handoff_pb2.NegotiateRequest, context: object
    ) -> Answer:
        """Pass on the question and the changed answer."""
        del context  # gRPC hands it to every method
        b = self._world.b
        async with open_channel(b.dest.address, b.identity, self._world.material("a")) as channel:
            answer: Answer = await DestinationServiceStub(channel).Negotiate(request, timeout=DEADLINE_S)
        self.change(answer)
        return answer


@pytest.fixture
async def altered(world: World) -> AsyncIterator[Altered]:
    """Listens with host b's certificate."""
    servicer = Altered(world)  # type: ignore[abstract]  # nothing else is asked of it
    server = grpc.aio.server()
    add_DestinationServiceServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(TlsFiles(world.tls_dir("b"))))
    servicer.address = f"127.0.0.1:{port}"
    await server.start()
    yield servicer
    await server.stop(None)
