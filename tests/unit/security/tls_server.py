"""A data port with a service that only says who called; run by test_tls.py in a process of its own.

TLS 1.2 must be shut out before gRPC is loaded, which a test process that has loaded it already cannot do. The port
goes to the first line of stdout, then one JSON document per call. It ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from vmferry.security.tls13 import enforce_tls13

UNARY = "/vmferry.v1.SourceService/GetMigration"
STREAM = "/vmferry.v1.DestinationService/Transfer"


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


async def serve(directory: Path) -> None:
    import grpc
    import grpc.aio

    from vmferry.errors import VmferryError
    from vmferry.security.authorization import (
        authorize,
        caller_from_auth_context,
        tls_version_from_auth_context,
    )
    from vmferry.security.tls import SERVER_OPTIONS, TlsFiles, server_credentials

    files = TlsFiles(directory)
    own = files.load().identity

    async def admit(method: str, context: Any) -> bytes:
        auth = context.auth_context()
        version = tls_version_from_auth_context(auth)
        outcome = {"tls": version, "peer": context.peer(), "caller": "", "reason": ""}
        try:
            caller = caller_from_auth_context(auth)
            outcome["caller"] = caller.uri
            authorize(method, caller=caller, own=own, tls_version=version)
        except VmferryError as error:
            outcome["reason"] = error.reason
            say(outcome)
            await context.abort(grpc.StatusCode[error.code], str(error))
        say(outcome)
        return json.dumps(outcome).encode()

    async def unary(_request: bytes, context: Any) -> bytes:
        return await admit(UNARY, context)

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await admit(STREAM, context)
        async for request in requests:
            yield request

    server = grpc.aio.server(options=SERVER_OPTIONS)
    for method, handler in (
        (UNARY, grpc.unary_unary_rpc_method_handler(unary)),
        (STREAM, grpc.stream_stream_rpc_method_handler(stream)),
    ):
        _, service, name = method.split("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files))
    await server.start()
    say(port)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    if "--let-tls12-in" not in sys.argv:
        enforce_tls13()
    asyncio.run(serve(Path(sys.argv[1])))
