"""The client of the guest agent: what a good one is asked, and what a bad one cannot do."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path

import pytest

from tests.unit.machines.agents import answering, guest, question
from vmferry.machines.agent import AgentError, AgentRefusedError, conversation

LIMIT_S = 60.0


async def test_an_agent_is_asked_for_its_time_and_given_one(tmp_path: Path) -> None:
    """What it says is between two instants of this host; what it is given is this host's time, a moment ahead."""
    given: list[dict[str, object]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            asked = await question(reader)
            given.append(asked)
            answer: object = {}
            if asked["execute"] == "guest-sync-delimited":
                writer.write(b"\xff")
                assert isinstance(asked["arguments"], dict)
                answer = asked["arguments"]["id"]
            elif asked["execute"] == "guest-get-time":
                answer = time.time_ns() - 7_000_000_000
            writer.write(json.dumps({"return": answer}).encode() + b"\n")

    async with asyncio.timeout(LIMIT_S), guest(tmp_path / "s", serve) as path, conversation(path) as agent:
        await agent.synchronise()
        reading = await agent.read_clock()
        before = time.time_ns()
        await agent.set_clock(5_000)
        after = time.time_ns()
    assert reading.least_ns <= -7_000_000_000 <= reading.most_ns
    assert reading.offset_us == pytest.approx(-7_000_000, abs=reading.took_ns / 1000)
    assert given[2]["execute"] == "guest-set-time"
    told = given[2]["arguments"]
    assert isinstance(told, dict)
    assert before + 5_000 <= told["time"] <= after + 5_000


@pytest.mark.parametrize(
    "left",
    [
        b"",
        b'{"return": 5}\n',
        b'\xff{"return": 1}\n',
        b"\xff\xff\xff\n",
        b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n',
        b"\xff" + b"[" * 5000,
        b"x" * 100_000,
    ],
)
async def test_what_was_left_unread_is_thrown_away(tmp_path: Path, left: bytes) -> None:
    """An earlier caller went away in the middle, or the guest has written what it liked."""
    serve = answering(b'{"return": 1800000000000000000}\n', before=left)
    async with asyncio.timeout(LIMIT_S), guest(tmp_path / "s", serve) as path, conversation(path) as agent:
        await agent.synchronise()
        assert (await agent.read_clock()).guest_ns == 1_800_000_000_000_000_000


@pytest.mark.parametrize(
    "answer",
    [
        b'{"return": "noon"}\n',
        b'{"return": true}\n',
        b'{"return": -1}\n',
        b'{"return": 0}\n',
        b'{"return": 1e300}\n',
        b'{"return": 9223372036854775808}\n',
        b'{"return": ' + b"9" * 4000 + b"}\n",
        b'{"return": 1, "error": {}}\n',
        b"{}\n",
        b"[1]\n",
        b"null\n",
        b"\xff\xfe\n",
        b"[" * 4000 + b"\n",
        b"x" * 10_000,
    ],
)
async def test_an_answer_without_sense_is_an_error(tmp_path: Path, answer: bytes) -> None:
    """Nothing that a guest says gets further than the client, and none of its words is repeated."""
    serve = answering(answer)
    async with asyncio.timeout(LIMIT_S), guest(tmp_path / "s", serve) as path, conversation(path) as agent:
        await agent.synchronise()
        with pytest.raises(AgentError) as caught:
            await agent.read_clock()
    assert "guest's agent" in caught.value.message
    assert answer.decode(errors="replace").strip() not in caught.value.message


async def test_a_refusal_is_told_apart(tmp_path: Path) -> None:
    """An agent that says no, in words that nobody repeats."""
    serve = answering(b'{"error": {"class": "CommandNotFound", "desc": "rm -rf"}}\n')
    async with asyncio.timeout(LIMIT_S), guest(tmp_path / "s", serve) as path, conversation(path) as agent:
        await agent.synchronise()
        with pytest.raises(AgentRefusedError) as caught:
            await agent.set_clock(0)
    assert "rm" not in caught.value.message


@pytest.mark.parametrize("flood", [b"x" * 65536, b"\xff" * 64, b'\xff{"return": 1}\n' * 1000, b"\n" * 65536])
async def test_a_guest_that_floods_is_given_up(tmp_path: Path, flood: bytes) -> None:
    """By the amount it sent, or when the time is over; the loop goes on meanwhile."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in itertools.count():
            writer.write(flood)
            await writer.drain()

    async with guest(tmp_path / "s", serve) as path:
        with pytest.raises((AgentError, TimeoutError)):
            async with asyncio.timeout(0.5), conversation(path) as agent:
                await agent.synchronise()


async def test_a_guest_that_is_silent_or_gone(tmp_path: Path) -> None:
    """Silence ends with the caller's time; a channel that is closed, or was never there, is an error at once."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\n")

    async with guest(tmp_path / "silent", silent) as path:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), conversation(path) as agent:
                await agent.synchronise()
    async with asyncio.timeout(LIMIT_S), guest(tmp_path / "gone", gone) as path:
        async with conversation(path) as agent:
            with pytest.raises(AgentError, match="closed"):
                await agent.synchronise()
        with pytest.raises(AgentError, match="cannot be reached"):
            async with conversation(tmp_path / "never"):
                pass
