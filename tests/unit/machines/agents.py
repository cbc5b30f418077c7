"""Guests' ends of a channel, which behave as a test wants; real agents are asked in the tests with QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def guest(path: Path, serve: Serve) -> AsyncIterator[Path]:
    """A guest's end of a channel."""
    running: list[asyncio.Task[None]] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(
        lambda reader, writer: running.append(asyncio.create_task(speak(reader, writer))), path
    )
    try:
        yield path
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def question(reader: asyncio.StreamReader) -> dict[str, object]:
    """The next question, without the byte that ends what came before."""
    line = await reader.readuntil(b"\n")
    found = json.loads(line.lstrip(b"\xff"))
    assert isinstance(found, dict)
    return found


def answering(*answers: bytes, before: bytes = b"") -> Serve:
    """An agent that synchronises well, and then answers like this."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await question(reader)
        assert asked["execute"] == "guest-sync-delimited"
        arguments = asked["arguments"]
        assert isinstance(arguments, dict)
        writer.write(before + b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n")
        for answer in answers:
            await reader.readuntil(b"\n")
            writer.write(answer)
        await reader.read()

    return serve


@dataclass
class ScriptedAgent:
    """An agent with a clock, which may be slow, refuse, or fall silent."""

    offset_ns: int
    """Guest minus host."""
    delay_s: float = 0.0
    """How long it takes to come to what it was told to set."""
    refuses: bool = False
    silent_at: str = ""
    """The question that it does not answer."""
    asked: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer for as long as somebody asks."""
        while True:
            message = await question(reader)
            name, arguments = str(message["execute"]), message.get("arguments")
            self.asked.append(name)
            if name == self.silent_at:
                await reader.read()
            answer: dict[str, object] = {"return": {}}
            if name == "guest-sync-delimited":
                assert isinstance(arguments, dict)
                writer.write(b"\xff")
                answer = {"return": arguments["id"]}
            elif name == "guest-get-time":
                answer = {"return": time.time_ns() + self.offset_ns}
            elif self.refuses:
                answer = {"error": {"class": "GenericError", "desc": "no hwclock"}}
            else:
                assert isinstance(arguments, dict)
                await asyncio.sleep(self.delay_s)  # what it is: late
                self.offset_ns = arguments["time"] - time.time_ns()
            writer.write(json.dumps(answer).encode() + b"\n")
