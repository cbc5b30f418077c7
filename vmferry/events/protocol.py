"""The metadata service's protocol: which answer a request gets.

Promise: the answer follows from the request and what is known of the machine, and from nothing else; the same request
gets the same answer, an error included. Who asks is never taken from what is asked: whoever calls says whose machine
it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vmferry.events import document, instance
from vmferry.events.states import Board

EVENT_VERSIONS: Final = (
    "2017-03-01",
    "2017-08-01",
    "2017-11-01",
    "2019-01-01",
    "2019-04-01",
    "2019-08-01",
    "2020-07-01",
)
"""Versions of the events document; all of them get all members, which no client of an older one minds."""
VERSIONS: Final = tuple(sorted({*EVENT_VERSIONS, *instance.VERSIONS}))
"""What any request may ask for: an error names the newest of them whatever was asked, so they must all do."""
MAX_BODY_BYTES: Final = 64 * 1024

JSON: Final = "application/json"
TEXT: Final = "text/plain"
_NO_VERSION: Final = (
    "Bad request. api-version is invalid or was not specified in the request. "
    "For more information refer to aka.ms/azureimds"
)
_NEWEST: Final = 3


@dataclass(frozen=True)
class Request:
    """What was asked."""

    method: str
    path: str
    """Decoded, without the query."""
    query: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    """By names in small letters."""
    body: bytes = b""


@dataclass(frozen=True)
class Response:
    """What is answered."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What one machine is shown."""

    board: Board
    """Its own events, and which document it was shown."""
    set_boards: Sequence[Board]
    """Those of the other machines of its availability set."""
    document: bytes
    instance: instance.Instance

    def knows(self, event_id: str) -> bool:
        """Whether this machine has, or had lately, an event of this identity to see."""
        return any(board.knows(event_id) for board in (self.board, *self.set_boards))


@dataclass(frozen=True)
class Answer:
    """The answer, and the events that it approves."""

    response: Response
    approves: Sequence[str] = ()


Handler = Callable[[Request, Sequence[str], View], Answer]


def answer(request: Request, view: View) -> Answer:
    """Answer one request of the machine that is viewed."""
    if "x-forwarded-for" in request.headers:
        return _refused(400, "Bad request. Requests through a proxy are not answered")
    if request.headers.get("metadata", "").strip().lower() != "true":
        return _refused(400, "Bad request. Required metadata header not specified")
    names = [name.lower() for name, _ in request.query]
    if len(set(names)) != len(names):
        return _refused(400, "Bad request. A query parameter is there more than once")
    root, *path = [part for part in request.path.split("/") if part] or [""]
    if root.lower() != "metadata" or not path or path[0].lower() not in _RESOURCES:
        return _refused(404, "Not found")
    methods = _RESOURCES[path[0].lower()]
    handler = methods.get(request.method)
    if handler is None:
        allow = {"Allow": ", ".join(methods)}
        return Answer(Response(405, _error(f"The method {request.method} is not supported"), headers=allow))
    return handler(request, path[1:], view)


def asks_for_events(request: Request) -> bool:
    """Whether a guest is at work there that cares for its events, whatever its request is worth otherwise."""
    parts = [part.lower() for part in request.path.split("/") if part]
    return parts == ["metadata", "scheduledevents"] and "metadata" in request.headers


def too_many() -> Response:
    """What is answered beyond the rate limit."""
    return Response(429, _error("Too many requests"), headers={"Retry-After": "1"})


def _events(request: Request, path: Sequence[str], view: View) -> Answer:
    if path:
        return _refused(404, "Not found")
    if _parameter(request, "api-version") not in VERSIONS:
        return _no_version()
    tag = document.etag(view.document)
    headers = {"ETag": tag, "Cache-Control": "no-store"}
    if request.headers.get("if-none-match") == tag:
        return Answer(Response(304, headers=headers))
    return Answer(Response(200, view.document, headers=headers))


def _acknowledge(request: Request, path: Sequence[str], view: View) -> Answer:
    if path:
        return _refused(404, "Not found")
    if _parameter(request, "api-version") not in VERSIONS:
        return _no_version()
    wanted = _event_ids(request.body)
    if wanted is None:
        return _refused(400, 'Bad request. The body must be {"StartRequests":[{"EventId":"..."}]}')
    known = [event_id for event_id in wanted if view.knows(event_id)]
    if not known:
        return _refused(400, "Bad request. No event has one of these identities")
    return Answer(Response(200, view.document), known)


def _event_ids(body: bytes) -> list[str] | None:
    """The identities that a body names, whatever its type is said to be; None if it is malformed."""
    if len(body) > MAX_BODY_BYTES:
        return None
    try:
        said = json.loads(body.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return None
    starts = said.get("StartRequests") if isinstance(said, dict) else None
    if not isinstance(starts, list):
        return None
    ids = [one.get("EventId") if isinstance(one, dict) else None for one in starts]
    return None if None in ids else [one for one in ids if isinstance(one, str)]


def _instance(request: Request, path: Sequence[str], view: View) -> Answer:
    if _parameter(request, "api-version") not in VERSIONS:
        return _no_version()
    found: object = instance.document(view.instance)
    for part in path:
        found = _element(found, part)
        if found is None:
            return _refused(404, "Not found")
    if _parameter(request, "format").lower() != "text":
        return Answer(Response(200, _json(found)))
    if isinstance(found, str):
        return Answer(Response(200, found.encode(), TEXT))
    parts = found if isinstance(found, Mapping) else range(len(found)) if isinstance(found, list) else ()
    return Answer(Response(200, "\n".join(str(part) for part in parts).encode(), TEXT))


def _element(parent: object, part: str) -> object:
    if isinstance(parent, Mapping):
        return parent.get(part)
    if isinstance(parent, list) and part.isascii() and part.isdecimal() and int(part) < len(parent):
        return parent[int(part)]
    return None


def _versions(_request: Request, path: Sequence[str], _view: View) -> Answer:
    if path:
        return _refused(404, "Not found")
    return Answer(Response(200, _json({"apiVersions": list(VERSIONS)})))


_RESOURCES: Final[Mapping[str, Mapping[str, Handler]]] = {
    "scheduledevents": {"GET": _events, "HEAD": _events, "POST": _acknowledge},
    "instance": {"GET": _instance, "HEAD": _instance},
    "versions": {"GET": _versions, "HEAD": _versions},
}


def _parameter(request: Request, name: str) -> str:
    return next((value for key, value in request.query if key.lower() == name), "")


def _no_version() -> Answer:
    newest = list(reversed(VERSIONS[-_NEWEST:]))
    return Answer(Response(400, _json({"error": _NO_VERSION, "newest-versions": newest})))


def _refused(status: int, error: str) -> Answer:
    return Answer(Response(status, _error(error)))


def _error(text: str) -> bytes:
    return _json({"error": text})


def _json(value: object) -> bytes:
    plain = dict(value) if isinstance(value, Mapping) else value
    return json.dumps(plain, separators=(",", ":")).encode()
