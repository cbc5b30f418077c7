"""The private socket for device state: complete, bounded, and gone afterwards."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from vmferry.machines import state_socket
from vmferry.machines.state_socket import StateTooLargeError, connected, receiving, send_all


async def test_what_is_sent_is_what_is_received(tmp_path: Path) -> None:
    """More than a socket's buffer goes through unchanged, and the socket's file does not stay."""
    path = tmp_path / "s"
    data = bytes(range(256)) * 8192
    async with receiving(path) as received:
        with await connected(path) as link:
            await send_all(link, data)
            assert await received == data
    assert not path.exists()


async def test_state_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte more than the limit is an error, not memory."""
    monkeypatch.setattr(state_socket, "MAX_STATE_BYTES", 1000)
    async with receiving(tmp_path / "s") as received:
        with await connected(tmp_path / "s") as link:
            await send_all(link, bytes(1001))
            with pytest.raises(StateTooLargeError):
                await received


async def test_nobody_coming_leaves_nothing(tmp_path: Path) -> None:
    """Giving up the wait ends the task and removes the file, even one that was there before."""
    path = tmp_path / "s"
    path.write_text("left over")
    async with receiving(path) as received:
        assert path.is_socket()
    assert received.cancelled()
    assert not path.exists()


async def test_a_listener_that_hangs_up_early_is_no_crash(tmp_path: Path) -> None:
    """The sender goes on to ask the hypervisor why, instead of failing with a broken pipe."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)

        async def hang_up() -> None:
            link, _ = await asyncio.get_running_loop().sock_accept(listener)
            link.close()

        task = asyncio.create_task(hang_up())
        with await connected(path) as link:
            await send_all(link, bytes(8_000_000))
            await task


async def test_giving_up_in_the_moment_when_somebody_comes_is_no_fault(tmp_path: Path) -> None:
    """Cancelled between the caller's coming and its being taken: nothing is complained of, nothing stays."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, said: complaints.append(said))
    try:
        async with receiving(tmp_path / "s") as received:
            while not await _is_waiting(received):
                pass
            with await connected(tmp_path / "s"):
                loop.call_soon(received.cancel)
                await asyncio.wait((received,))
            assert received.cancelled()
    finally:
        loop.set_exception_handler(None)
    assert complaints == []


async def _is_waiting(task: asyncio.Task[bytes]) -> bool:
    """Whether a task has come to where it waits."""
    await asyncio.sleep(0)
    return bool(task.get_stack())
