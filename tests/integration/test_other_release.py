"""A destination of another release, or on a very different host: the answers of a real one, changed on their way.

What two hosts of one kernel cannot differ in is changed here in the message; everything else about it is real.
"""

from __future__ import annotations

import pytest

from tests.integration.alterations import Altered, Answer, Change, altered
from tests.integration.hosts import World
from tests.integration.services import DEADLINE_S
from vmferry.v1 import compatibility_pb2, handoff_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")
__all__ = ["altered"]


async def told(world: World, altered: Altered, *changes: Change) -> set[tuple[str, int]]:
    """Names and severities of what a plan says with these changes, and not without."""
    guest = await world.run()
    found: list[set[tuple[str, int]]] = []
    for chosen in ((), changes):
        altered.change = lambda answer, chosen=chosen: [change(answer) for change in chosen]  # type: ignore[misc]
        request = pb.PlanMigrationRequest(
            machine=guest.id,
            destination=pb.Destination(host=world.b.identity.uri, address=altered.address),
        )
        async with world.source(world.a) as stub:
            report = (await stub.PlanMigration(request, timeout=DEADLINE_S)).report
        found.append({(item.id, int(item.severity)) for item in report.items})
    return found[1] - found[0]


def _no_direct_tracker(answer: Answer) -> None:
    for tracker in answer.offer.trackers:
        tracker.usable = tracker.kind == "hash"


def _larger_pages(answer: handoff_pb2.NegotiateResponse) -> None:
    for sized in (answer.offer, *answer.offer.memory_backings):
        sized.page_size_bytes = 65536


def _older_state(answer: Answer) -> None:
    for kind in answer.offer.kinds:
        kind.oldest_state_version = kind.newest_state_version = 0


NOTE, WARNS, BLOCKS = 1, 2, 3
CHANGES: dict[str, tuple[Change, set[tuple[str, int]]]] = {
    "protocol": (
        lambda answer: answer.offer.protocol_versions.__setitem__(slice(None), [77]),
        {("protocol.no-common-version", BLOCKS)},
    ),
    "encodings": (
        lambda answer: answer.offer.encodings.__setitem__(slice(None), ["other"]),
        {("encoding.no-common", BLOCKS)},
    ),
    "pages": (
        _larger_pages,
        {("memory.page-size", BLOCKS)},
    ),
    "state": (_older_state, {("machine.state-version", BLOCKS)}),
    "ahead": (
        lambda answer: setattr(answer.offer.time, "seconds", answer.offer.time.seconds + 30),
        {("clock.skew", WARNS)},
    ),
    "behind": (
        lambda answer: setattr(answer.offer.time, "seconds", answer.offer.time.seconds - 30),
        {("clock.skew", WARNS)},
    ),
    "clock": (
        lambda answer: setattr(answer.offer, "clock_source", "other"),
        {("clock.source", NOTE)},
    ),
    "kernel": (
        lambda answer: setattr(answer.offer, "kernel", "5.10.0"),
        {("kernel.older", NOTE)},
    ),
    "tracker": (_no_direct_tracker, {("tracker.way-back", WARNS)}),
    "software": (
        lambda answer: setattr(answer.offer, "software_version", "0.0.9"),
        {("software.differs", NOTE)},
    ),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_each_difference_is_told(world: World, altered: Altered, what: str) -> None:
    """One thing is different at the destination: exactly that is in the report."""
    change, expected = CHANGES[what]
    assert await told(world, altered, change) == expected


async def test_all_differences_are_told_at_once(world: World, altered: Altered) -> None:
    """Everything is different at the destination: everything is in one report."""
    changes = [change for name, (change, _) in CHANGES.items() if name != "behind"]
    expected = {finding for name, (_, findings) in CHANGES.items() for finding in findings}
    assert await told(world, altered, *changes) == expected


async def test_a_release_that_says_less_is_not_blamed(world: World, altered: Altered) -> None:
    """What an older release does not know to say is not held against it; and what it refuses, it refuses."""

    def older(answer: Answer) -> None:
        for field in (
            "draining", "cpus", "clock_source", "time", "certificate_expire_time", "paths", "memory_backings",
        ):  # fmt: skip
            answer.offer.ClearField(field)
        answer.items.add(id="something.older", message="no", object="it", remedy="another")

    assert await told(world, altered, older) == {("something.older", compatibility_pb2.SEVERITY_BLOCKS)}
