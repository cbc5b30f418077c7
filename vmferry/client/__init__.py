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

# If gRPC was loaded before, it is left to the services, which refuse TLS 1.2 all the same.
with contextlib.suppress(InternalError):
    enforce_tls13()

from vmferry.client.blocking import BlockingSourceClient
from vmferry.client.connection import Tries, call_error
from vmferry.client.draining import drain_is_over, new_request_id
from vmferry.client.places import Target, check_address, host_identity
from vmferry.client.source import SourceClient
from vmferry.client.updating import Wanted
from vmferry.client.watching import Patience

__all__ = [
    "BlockingSourceClient",
    "Patience",
    "SourceClient",
    "Target",
    "Tries",
    "Wanted",
    "call_error",
    "check_address",
    "drain_is_over",
    "host_identity",
    "new_request_id",
]
