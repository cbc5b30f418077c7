"""Which names a browser may have asked for this host by."""

from __future__ import annotations

import pytest

from vmferry.web.guard import names_loopback


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost:80",
        "127.0.0.1",
        "127.0.0.1:7621",
        "127.9.9.9:1",
        "[::1]",
        "[::1]:7621",
    ],
)
def test_this_host(host: str) -> None:
    """Loopback by name or address, with any port."""
    assert names_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        *("", ":80", "localhost.", "localhost.evil.example", "evil.example", "evil.example:80", "0.0.0.0:80"),
        *(
            "127.0.0.1.evil.example",
            "127.0.0.1@evil.example",
            "localhost:80:80",
            "localhost:x",
            "192.0.2.1",
            "[::]",
        ),
        *("2130706433", "0x7f000001", "[::ffff:192.0.2.1]", "localhost, evil.example", "::1:80:", "127.1"),
    ],
)
def test_anything_else(host: str) -> None:
    """Every other name could have been made to resolve to this host, so it is not answered."""
    assert not names_loopback(host)
