"""Work done together fails together, and what must not stop halfway goes to its end."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.errors import StreamBrokenError
from vmferry.together import to_the_end, together


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
