"""What a scheduler calls: a host's source service, with tickets, retries and errors taken care of.

    from vmferry.client import SourceClient, Target

    async with SourceClient.open("10.0.0.1:7601", "spiffe://example.org/vmhost/a", Path("tls")) as a:
        migration = await a.migrate("web-1", Target("spiffe://example.org/vmhost/b", "10.0.0.2:7602"))

Promise: importing it shuts TLS 1.2 out before gRPC is loaded, unless somebody else has loaded that already.
"""

from __future__ import annotations

import contextlib

from vmferry.errors import InternalError
from vmferry.security.tls13 import enforce_tls13

with contextlib.suppress(
    InternalError
):  # gRPC was loaded before; a service of vmferry refuses TLS 1.2 all the same
    enforce_tls13()  # before anything imports gRPC

from vmferry.client.blocking import BlockingSourceClient
from vmferry.client.places import Target, check_address, host_identity
from vmferry.client.source import SourceClient, call_error, new_request_id
from vmferry.client.watching import Patience

__all__ = [
    "BlockingSourceClient",
    "Patience",
    "SourceClient",
    "Target",
    "call_error",
    "check_address",
    "host_identity",
    "new_request_id",
]
