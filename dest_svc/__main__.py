"""``vmferry-dest``: runs the destination service of a host."""

from __future__ import annotations

import sys

from vmferry.security.tls13 import enforce_tls13

enforce_tls13()  # before anything imports gRPC

from vmferry.rpc.daemon import run_daemon  # noqa: E402 - see above


def main() -> None:
    """Run until stopped."""
    from dest_svc.daemon import serve  # noqa: PLC0415 - after the command line was read, so that --help is quick

    sys.exit(run_daemon("dest", serve))


if __name__ == "__main__":
    main()
