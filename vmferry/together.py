"""Work that must not stop halfway: several things at a time, all or none; and one thing whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run all of ``work`` at once; the first failure cancels the rest and is raised as it is.

    Nothing is still running when this returns or raises.
    """
    tasks = [asyncio.create_task(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task in done and not task.cancelled() and task.exception()]
        return [task.result() for task in (failed or tasks)]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def to_the_end(work: Coroutine[Any, Any, Result]) -> Result:
    """Run ``work`` to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # the cancellation is what the caller must see
        raise
