"""A client of the services' HTTP listeners."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator

import aiohttp

from tests.integration.services import Service

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@contextlib.asynccontextmanager
async def client(service: Service) -> AsyncIterator[aiohttp.ClientSession]:
    """A session whose relative addresses mean this service."""
    path = service.http.removeprefix("unix:")
    unix = path != service.http
    connector = aiohttp.UnixConnector(path) if unix else aiohttp.TCPConnector()
    base = "http://localhost" if unix else f"http://{service.http}"
    async with aiohttp.ClientSession(base, connector=connector) as session:
        yield session


async def scraped(service: Service) -> str:
    """What Prometheus would read."""
    async with client(service) as session, session.get("/metrics") as answer:
        assert answer.status == 200
        return await answer.text()


def samples(text: str) -> Samples:
    """The samples of a scrape by name and labels."""
    found: Samples = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            sample = _SAMPLE.fullmatch(line)
            assert sample, line
            key = (sample["name"], frozenset(_LABEL.findall(sample["labels"] or "")))
            assert key not in found, f"twice: {line}"
            found[key] = float(sample["value"])
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    """One sample; labels are given without the prefix of ours."""
    wanted = frozenset((f"vmferry_{key}", text) for key, text in labels.items())
    return found[name, wanted]
