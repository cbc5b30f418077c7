"""A client of the metadata service, written from its public documentation alone: plain HTTP, nothing of vmferry's.

It speaks to a unix socket or to a TCP port; what is sent is given as text where a test is about bytes.
"""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

URL = "/metadata/scheduledevents?api-version=2020-07-01"
TIMEOUT_S = 10.0


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, which must be JSON."""
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("169.254.169.254", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


class Client:
    """One guest's view."""

    def __init__(self, where: Path | int) -> None:
        self.where = where
        self.last = 0
        """Number of the newest document."""

    def open(self) -> http.client.HTTPConnection:
        """A connection, which is the caller's to close."""
        if isinstance(self.where, Path):
            return _UnixConnection(self.where)
        return http.client.HTTPConnection("127.0.0.1", self.where, timeout=TIMEOUT_S)

    def request(
        self, method: str = "GET", url: str = URL, body: bytes | None = None, **headers: str
    ) -> Reply:
        """One request over a connection of its own."""
        connection = self.open()
        try:
            return self.over(connection, method, url, body, **headers)
        finally:
            connection.close()

    @staticmethod
    def over(
        connection: http.client.HTTPConnection,
        method: str = "GET",
        url: str = URL,
        body: bytes | None = None,
        **headers: str,
    ) -> Reply:
        """One request over a connection that stays open."""
        given = {"Metadata": "true"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, url, body, given)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, found, answer.read())

    def raw(self, text: bytes, *, until: bytes) -> bytes:
        """Send bytes as they are, and read until something has come."""
        connection = self.open()
        connection.connect()
        try:
            connection.sock.sendall(text)
            came = b""
            while until not in came and (data := connection.sock.recv(65536)):
                came += data
            return came
        finally:
            connection.close()

    def events(self) -> list[dict[str, Any]]:
        """The events now; the document's number never goes back."""
        reply = self.request()
        assert reply.status == 200, reply
        number = reply.json["DocumentIncarnation"]
        assert number >= self.last
        self.last = number
        found: list[dict[str, Any]] = reply.json["Events"]
        return found

    def acknowledge(self, event_id: str) -> Reply:
        """Approve an event, as the documentation's sample does it."""
        body = json.dumps({"StartRequests": [{"EventId": event_id}]}).encode()
        return self.request("POST", URL, body)
