"""The HTTP listener of a service: metrics for Prometheus, and the page for people.

Promise: only this host can reach it, by a unix socket that only its owner may open or a loopback port; an
address that somebody else has is refused at the start; it holds nothing up when the service ends.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from aiohttp import web

from vmferry.errors import ConfigError
from vmferry.rpc.local import UNIX, loopback, private_files, socket_path
from vmferry.web.app import Site, make_app

_END_S: Final = 0.2
"""How long an answer that is under way when the service ends may take."""
_BACKLOG: Final = 64


@contextlib.asynccontextmanager
async def serve_http(site: Site, target: str) -> AsyncIterator[str]:
    """Serve meanwhile; gives the address, ``unix:/path`` or ``address:port``, or "" if there is to be no listener.

    Raises:
        ConfigError: the address is taken, or others could reach it.
    """
    if not target:
        yield ""
        return
    listener, path = _listen(target, f"{site.role}_http_listen")
    runner = web.AppRunner(make_app(site), access_log=None, shutdown_timeout=_END_S, handle_signals=False)
    try:
        await runner.setup()
        await web.SockSite(runner, listener, backlog=_BACKLOG).start()
        yield f"{UNIX}{path}" if path else _spelt(*listener.getsockname()[:2])
    finally:
        await runner.cleanup()
        listener.close()
        if path is not None:
            path.unlink(missing_ok=True)


def _listen(target: str, setting: str) -> tuple[socket.socket, Path | None]:
    """A socket that takes connections already, and where it is if it is a unix socket."""
    if target.startswith(UNIX):
        path = socket_path(target, setting)
        listener = socket.socket(socket.AF_UNIX)
        with private_files(), _naming(listener, target, setting):
            listener.bind(str(path))
            listener.listen(_BACKLOG)
        return listener, path
    host, _, port = loopback(target, setting).rpartition(":")
    literal = host.removeprefix("[").removesuffix("]")
    listener = socket.socket(socket.AF_INET6 if ":" in literal else socket.AF_INET)
    with _naming(listener, target, setting):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((literal, int(port)))
        listener.listen(_BACKLOG)
    return listener, None


@contextlib.contextmanager
def _naming(listener: socket.socket, target: str, setting: str) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {target}: {error}", field=setting) from error


def _spelt(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
