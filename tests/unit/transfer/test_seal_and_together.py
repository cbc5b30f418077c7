"""The seal covers everything that is handed over; work done together fails together."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from vmferry.errors import StreamBrokenError
from vmferry.handoff.states import Attempt
from vmferry.transfer.seal import seal_digest
from vmferry.transfer.together import to_the_end, together

ATTEMPT = Attempt("m", b"i" * 16, 1, 1, "s", "d", "x", "y")
PARTS = {"memory_root": b"r" * 16, "device_state": b"state", "spec_digest": b"p" * 32}


@pytest.mark.parametrize("part", PARTS)
def test_the_seal_depends_on_every_part(part: str) -> None:
    """No part may differ unnoticed."""
    assert seal_digest(ATTEMPT, **PARTS) != seal_digest(ATTEMPT, **(PARTS | {part: PARTS[part] + b"!"}))


@pytest.mark.parametrize(
    "other",
    [
        replace(ATTEMPT, machine_id="n"),
        replace(ATTEMPT, migration_id=b"j" * 16),
        replace(ATTEMPT, number=2),
        replace(ATTEMPT, epoch_from=2),
    ],
)
def test_the_seal_is_of_one_attempt(other: Attempt) -> None:
    """The same memory sealed for another attempt has another digest."""
    assert seal_digest(ATTEMPT, **PARTS) != seal_digest(other, **PARTS)


async def test_results_come_in_order() -> None:
    """Results are returned in the order of the work, not of its end."""

    async def give(value: int, turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return value

    assert await together(give(1, 5), give(2, 0)) == [1, 2]


async def test_the_first_failure_cancels_the_rest_and_is_raised_as_it_is() -> None:
    """A failure is not wrapped, and nothing is left running."""
    cancelled = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def fail() -> None:
        raise StreamBrokenError("lost")

    with pytest.raises(StreamBrokenError, match="lost"):
        await together(wait(), fail())
    assert cancelled.is_set()


async def test_cancelling_the_caller_cancels_the_work() -> None:
    """Whoever is cancelled leaves nothing running."""
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(together(wait()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_work_goes_to_its_end_although_the_caller_is_cancelled() -> None:
    """A write that is on its way is finished before the cancellation is seen."""
    may_end, ended = asyncio.Event(), False

    async def write() -> None:
        nonlocal ended
        await may_end.wait()
        ended = True

    task = asyncio.create_task(to_the_end(write()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_what_goes_to_its_end_may_fail() -> None:
    """A failure is raised as it is."""

    async def fail() -> None:
        raise StreamBrokenError("lost")

    with pytest.raises(StreamBrokenError):
        await to_the_end(fail())
