"""``vmferry-dest``: runs the destination service of a host."""

from __future__ import annotations

import sys

from vmferry.rpc.allocator import share_one_heap
from vmferry.security.tls13 import enforce_tls13

# Before anything imports gRPC.
enforce_tls13()
share_one_heap()

from dest_svc.service import DestinationService  # noqa: E402 - see above
from vmferry.handoff.ledger import Role  # noqa: E402 - see above
from vmferry.rpc.daemon import run_daemon  # noqa: E402 - see above


def main() -> None:
    """Run until stopped."""
    sys.exit(run_daemon("dest", Role.DESTINATION, DestinationService))


if __name__ == "__main__":
    main()
