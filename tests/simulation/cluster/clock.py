"""An event loop whose clock is simulated, and processes in it that can be killed between any two steps.

Everything runs in one thread, in an order that depends on nothing but what was scheduled: what a run does once it
does always. Time passes only when there is nothing to do at the present moment. Work for threads is done in one go,
at a moment of its own. A killed process does not execute another step: its callbacks are thrown away when they are
due.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import warnings
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, Final

THREAD_S: Final = 0.0005
_BUSY_S: Final = 0.002


class Killed(BaseException):
    """The process that called does not exist any more."""


class WouldBlockError(BaseException):
    """The calling thread would wait for another process."""


class Process:
    """Something that can be killed; its tasks are those started in its context."""

    def __init__(self, name: str, host: str) -> None:
        self.name = name
        self.host = host
        self.alive = True
        self.context: Context = contextvars.copy_context()
        self.context.run(_PROCESS.set, self)

    def check(self) -> None:
        """Raise :class:`Killed` if it is."""
        if not self.alive:
            raise Killed(self.name)


_PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class Loop(asyncio.BaseEventLoop):
    """The event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self._now = 0.0
        self._queue: Any = self._ready  # type: ignore[attr-defined]
        self._timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        self.set_exception_handler(lambda *_: None)

    def time(self) -> float:
        """The simulated time in seconds."""
        return self._now

    def _run_once(self) -> None:
        if not self._queue:
            timer = heapq.heappop(self._timers)  # there always is one: whoever runs the loop waits for a time
            timer._scheduled = False  # type: ignore[attr-defined]
            self._now = max(self._now, timer.when())
            self._queue.append(timer)
        handle = self._queue.popleft()
        if handle._cancelled:
            return
        process = handle._context.get(_PROCESS)
        if process is None or process.alive:
            self.steps += 1
            handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is skipped when it is due."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Do a thread's work a little later; a thread that waits for a lock tries again."""
        future = self.create_future()

        def work() -> None:
            result, error = None, None
            try:
                result = func(*args)
            except Killed:
                return
            except WouldBlockError:
                self.call_later(_BUSY_S, work)
                return
            except Exception as raised:  # noqa: BLE001 - handed on to whoever waits
                error = raised
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.call_later(THREAD_S, work)
        return future

    def dispose(self) -> None:
        """Throw away what has not ended, as the end of the world does: without another effect."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for task in asyncio.all_tasks(self):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                _end(task.get_coro())
            self._queue.clear()
            self._timers.clear()
        self.close()


def _end(work: Any) -> None:
    for _ in range(20):
        try:
            work.close()
        except BaseException:  # noqa: BLE001 - handlers of a world that is gone
            continue
        return


def spawn(
    loop: Loop, process: Process | None, work: Coroutine[Any, Any, Any], context: Context | None = None
) -> asyncio.Task[Any]:
    """Start a task of a process."""
    if context is None and process is not None:
        context = process.context.copy()
    return loop.create_task(work, context=context)
