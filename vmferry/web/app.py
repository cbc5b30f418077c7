"""The resources of the HTTP listener.

Promise: each answer is made from what the service knows now; asking more often than a few times a second costs the
service nothing more, for all who watch are told the same.

    GET /                         the page
    GET /metrics                  for Prometheus
    GET /api/state                all that the page shows, as JSON
    GET /api/events               the same as server-sent events, whenever something has changed
    GET /api/traces/{trace_id}    the spans of a trace, as far as this host has them
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from vmferry.config import HostConfig
from vmferry.telemetry.exposition import CONTENT_TYPE
from vmferry.telemetry.recording import scrape
from vmferry.web.events import Feed
from vmferry.web.guard import add_headers, guard
from vmferry.web.spans import trace_document
from vmferry.web.view import View

_PAGES: Final = Path(__file__).with_name("pages")
_TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_INDEX: Final = "index.html"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Site:
    """What a listener shows."""

    role: str
    """``source`` or ``dest``."""
    host: str
    """Identity of this host."""
    config: HostConfig
    views: list[View]
    """The service; empty until it has begun."""


def make_app(site: Site) -> web.Application:
    """The application of one listener."""
    app = web.Application(middlewares=[guard], client_max_size=0)
    app.on_response_prepare.append(add_headers)
    feed = Feed(site.role, site.host, site.config, site.views)
    app.cleanup_ctx.append(feed.running)
    app.on_shutdown.append(feed.end)
    for path in sorted(_PAGES.iterdir()):
        if path.suffix in _TYPES:
            app.router.add_get("/" if path.name == _INDEX else f"/{path.name}", _file(path))
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/api/state", feed.state)
    app.router.add_get("/api/events", feed.events)
    app.router.add_get("/api/traces/{trace_id}", _trace(site.config.trace_dir))
    return app


def _file(path: Path) -> Handler:
    body, content_type = path.read_bytes(), _TYPES[path.suffix]

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return answer


async def _metrics(_request: web.Request) -> web.StreamResponse:
    # Gauges ask the event loop for what they measure, so the loop must not wait for them.
    text = await asyncio.to_thread(scrape)
    return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})


def _trace(trace_dir: Path) -> Handler:
    # Span files may be long: one at a time is read.
    reading = asyncio.Lock()

    async def answer(request: web.Request) -> web.StreamResponse:
        async with reading:
            return await trace_document(trace_dir, request.match_info["trace_id"])

    return answer
