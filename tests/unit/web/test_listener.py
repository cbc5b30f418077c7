"""Where the HTTP listener may be, and what happens to an address that somebody else has."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vmferry.config import HostConfig
from vmferry.errors import ConfigError
from vmferry.web.app import Site
from vmferry.web.listener import serve_http

SITE = Site("source", "spiffe://example.org/vmhost/a", HostConfig(), [])


@pytest.mark.parametrize(
    "target", ["0.0.0.0:80", "192.0.2.1:80", "[::]:80", "example.org:80", "127.0.0.1", "x"]
)
async def test_what_others_could_reach_is_refused(target: str) -> None:
    """Anything but a unix socket and a loopback port is a mistake in the configuration, which is named."""
    with pytest.raises(ConfigError) as caught:
        async with serve_http(SITE, target):
            pass
    assert caught.value.field == "source_http_listen"


async def test_a_taken_address_is_refused_and_left_alone(tmp_path: Path) -> None:
    """Neither a port nor a socket that somebody listens on is taken from them."""
    path = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        for target in (f"127.0.0.1:{port.getsockname()[1]}", f"unix:{path}"):
            with pytest.raises(ConfigError):
                async with serve_http(SITE, target):
                    pass
    assert path.exists()


async def test_what_a_service_left_behind_is_replaced(tmp_path: Path) -> None:
    """The socket of a killed service is in nobody's way; another file is never removed."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with serve_http(SITE, f"unix:{path}") as address:
        assert address == f"unix:{path}"
    assert not path.exists()
    path.write_text("mine", encoding="ascii")
    with pytest.raises(ConfigError):
        async with serve_http(SITE, f"unix:{path}"):
            pass
    assert path.read_text(encoding="ascii") == "mine"


async def test_the_port_is_free_again_at_once() -> None:
    """A service that is restarted gets its port back."""
    async with serve_http(SITE, "127.0.0.1:0") as address:
        pass
    async with serve_http(SITE, address) as again:
        assert again == address
    async with serve_http(SITE, "[::1]:0") as address:
        assert address.startswith(("[::1]:", "::1:"))


async def test_no_listener() -> None:
    """An empty setting means none."""
    async with serve_http(SITE, "") as address:
        assert address == ""
