"""The wait between two tries: cut short on demand, by one try that began afterwards, never by two at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from source_svc.pause import Pause
from vmferry.errors import ServiceStoppingError

LONG_S = 3600.0


class Work:
    """Something that is tried again and again, and how often it was."""

    def __init__(self) -> None:
        self.pause = Pause()
        self.began = 0
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.enough = 10**6
        self.cut: list[bool] = []

    async def run(self) -> None:
        """Try until it was enough."""
        while True:
            self.began += 1
            await self.may_end.wait()
            if self.began >= self.enough:
                return
            self.cut.append(await self.pause.wait(LONG_S))


@asynccontextmanager
async def working(work: Work) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_wait_is_cut_short() -> None:
    """Whoever is in a hurry gets exactly one more try, at once, and returns when it has ended."""
    work = Work()
    async with working(work) as task:
        await work.pause.hurry(task, tries=1)
        assert (work.began, work.cut) == (1, [])
        await work.pause.hurry(task)
        assert (work.began, work.cut) == (2, [True])


async def test_a_try_that_is_under_way_is_not_the_one_asked_for() -> None:
    """It may have begun with a connection that is dead by now: one more follows it, and not at the same time."""
    work = Work()
    work.may_end.clear()
    async with working(work) as task:
        hurry = asyncio.create_task(work.pause.hurry(task))
        await asyncio.sleep(0)
        assert work.began == 1
        work.may_end.set()
        await hurry
        assert work.began == 2


async def test_several_who_are_in_a_hurry_share_a_try() -> None:
    """Ten callers cost one try, and nobody is left waiting."""
    work = Work()
    async with working(work) as task:
        await work.pause.hurry(task, tries=1)
        await asyncio.gather(*(work.pause.hurry(task) for _ in range(10)))
        assert work.began == 2


async def test_the_end_of_the_task_ends_every_hurry() -> None:
    """A try that settles everything is the last one; who waits for it is told, too."""
    work = Work()
    work.enough = 2
    async with working(work) as task:
        await work.pause.hurry(task, tries=1)
        await work.pause.hurry(task)
        assert task.done()
        await work.pause.hurry(task)


async def test_nothing_is_tried_any_more_once_it_ended() -> None:
    """However long the wait was to be, the next try is left to the next start."""
    work = Work()
    async with working(work) as task:
        await work.pause.hurry(task, tries=1)
        work.pause.end()
        with pytest.raises(ServiceStoppingError):
            await task
    assert work.began == 1


async def test_a_try_that_is_under_way_when_it_ends_is_the_last() -> None:
    """It is not cut off, nothing follows it, and whoever hurried it is not left waiting."""
    work = Work()
    work.may_end.clear()
    async with working(work) as task:
        await asyncio.sleep(0)
        assert work.began == 1
        hurry = asyncio.create_task(work.pause.hurry(task))
        work.pause.end()
        await asyncio.sleep(0)
        assert not task.done()
        work.may_end.set()
        await hurry
        with pytest.raises(ServiceStoppingError):
            await task
    assert work.began == 1
