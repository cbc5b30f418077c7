"""What every answer over HTTP passes: who may ask, for what, and what a browser may do with it.

Promise: only GET and HEAD are answered, so that nothing can be changed; a page of another site can read nothing, not
even one whose name was made to resolve to this host (DNS rebinding), for only requests that name this host as
loopback are answered; the page loads nothing from anywhere else and runs no script but ours.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

_METHODS: Final = {"GET", "HEAD"}
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
"""On every answer."""


@web.middleware
async def guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse what may not be asked, and answer with :data:`HEADERS`."""
    if not names_loopback(request.headers.get("Host", "")):
        text = "This is not the name of this host. Use localhost, 127.0.0.1 or [::1].\n"
        return _plain(web.HTTPMisdirectedRequest.status_code, text)
    if request.method not in _METHODS:
        return _plain(
            web.HTTPMethodNotAllowed.status_code, "Nothing can be changed here.\n", Allow="GET, HEAD"
        )
    if request.headers.get("Sec-Fetch-Site", "none") == "cross-site":
        return _plain(web.HTTPForbidden.status_code, "Not for pages of other sites.\n")
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _plain(error.status, f"{error.reason}\n")


async def add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """Put :data:`HEADERS` on an answer."""
    response.headers.update(HEADERS)


def names_loopback(host: str) -> bool:
    """Whether the value of a Host header names this host itself, with any port: it may be forwarded."""
    name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
    if port and not port.isdigit():
        return False
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _plain(status: int, text: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=text, headers=headers)
