"""What guests are told of their events, and what their hosts record of them, as tests ask for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.integration.hosts import Guest
from tests.integration.metadata import Client
from tests.integration.services import Host, eventually
from vmferry.events.files import BoardFiles
from vmferry.events.states import Ended

RATE = 100_000
"""Requests a second: tests ask more often than guests."""


async def client(host: Host, guest: Guest) -> Client:
    """What a guest would use, once its host serves it."""
    path = host.config.guests_dir / f"{guest.spec.name}.sock"
    await eventually(path.is_socket, "the metadata service listens")
    return Client(path)


async def events(one: Client) -> list[dict[str, Any]]:
    """The events now."""
    return await asyncio.to_thread(one.events)


async def shown(one: Client, what: str = "Scheduled") -> dict[str, Any]:
    """The event, as soon as one is shown that is so far."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for event in await events(one):
            if event["EventStatus"] == what:
                return event
        await asyncio.sleep(0.005)
    pytest.fail(f"no event is {what}")


def past(host: Host, guest: Guest, event_id: str) -> Ended:
    """What a host has recorded of an event that is over."""
    found = BoardFiles(host.config.events_dir).load(guest.id).outcome(event_id)
    assert found is not None
    return found


def is_past(host: Host, guest: Guest, event_id: str) -> bool:
    """Whether it is over, as far as a host has recorded."""
    return BoardFiles(host.config.events_dir).load(guest.id).outcome(event_id) is not None
