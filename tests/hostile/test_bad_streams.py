"""A host with a valid certificate and a valid ticket that does not keep to the protocol.

After each offence, told by name, the destination holds nothing of the attempt once it is closed, and another guest
of these hosts has taken no harm and can still be moved.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.hostile.raw_source import (
    END_OF_STREAM,
    PAGES,
    Lane,
    Model,
    RawSource,
    Request,
)
from tests.integration.services import refusal
from vmferry.errors import VmferryError
from vmferry.memory.runs import PAGE_SIZE
from vmferry.v1 import handoff_pb2, transfer_pb2

pytestmark = pytest.mark.usefixtures("tidy")

PAGE = b"\xa5" * PAGE_SIZE
RECEIVING, PREPARED = handoff_pb2.ATTEMPT_STATE_RECEIVING, handoff_pb2.ATTEMPT_STATE_PREPARED
RUNNING, REFUSED = handoff_pb2.ATTEMPT_STATE_RUNNING, handoff_pb2.ATTEMPT_STATE_REFUSED
MAX_U64 = 2**64 - 1


def runs(*pairs: tuple[int, int]) -> list[transfer_pb2.PageRun]:
    return [transfer_pb2.PageRun(first_page=first, page_count=count) for first, count in pairs]


BAD_CHUNKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "behind the end": ("CHUNK_REJECTED", "runs", {"runs": runs((PAGES, 1))}),
    "across the end": ("CHUNK_REJECTED", "runs", {"runs": runs((PAGES - 1, 2)), "data": PAGE * 2}),
    "far outside": ("CHUNK_REJECTED", "runs", {"runs": runs((MAX_U64, 1))}),
    "wrapping around": ("CHUNK_REJECTED", "runs", {"runs": runs((MAX_U64, MAX_U64))}),
    "an empty run": ("CHUNK_REJECTED", "runs", {"runs": runs((0, 0)), "data": b""}),
    "overlapping runs": ("CHUNK_REJECTED", "runs", {"runs": runs((4, 2), (5, 1)), "data": PAGE * 3}),
    "runs out of order": ("CHUNK_REJECTED", "runs", {"runs": runs((9, 1), (3, 1)), "data": PAGE * 2}),
    "zeros outside": ("CHUNK_REJECTED", "zero_runs", {"zero_runs": runs((PAGES, 1))}),
    "too many zeros": ("CHUNK_REJECTED", "zero_runs", {"zero_runs": runs((0, MAX_U64))}),
    "too many pages": ("CHUNK_REJECTED", "runs", {"zero_runs": runs((0, PAGES)), "runs": runs((0, 1))}),
    "not whole pages": ("CHUNK_REJECTED", "data", {"data": PAGE[:-1]}),
    "less data than pages": ("CHUNK_REJECTED", "data", {"data": b""}),
    "more data than pages": ("CHUNK_REJECTED", "data", {"data": PAGE * 2}),
    "zeros with data": ("CHUNK_REJECTED", "data", {"runs": [], "zero_runs": runs((0, 1))}),
    "another region": ("CHUNK_REJECTED", "region", {"region": 1}),
    "an unknown encoding": ("CHUNK_REJECTED", "encoding", {"encoding": 99}),
    "a wrong hash": ("HASH_MISMATCH", "data_hash", {"data_hash": bytes(16)}),
    "a short hash": ("HASH_MISMATCH", "data_hash", {"data_hash": b"\x01"}),
    "no number": ("STREAM_BROKEN", "", {"sequence": 0}),
    "a gap": ("STREAM_BROKEN", "", {"sequence": 2}),
    "the last number": ("STREAM_BROKEN", "", {"sequence": MAX_U64}),
}


async def test_a_chunk_that_must_not_be_written_is_refused_by_name(lane: Lane, source: RawSource) -> None:
    """Ranges, sizes, hashes and numbers are checked before memory is touched, on a lane that can be reopened."""
    for name, (reason, field, changes) in BAD_CHUNKS.items():
        values = {"runs": runs((0, 1)), "data": PAGE} | changes
        bad = Lane(lane.call).chunk(**values)
        with pytest.raises(VmferryError) as caught:
            await lane.send(bad)
        assert (caught.value.reason, caught.value.field) == (reason, field), name
        assert caught.value.message, name
        lane = await source.open_lane()
    memory = source.to.directory.paths(source.spec).ram.read_bytes()
    assert not any(memory)
    assert (await lane.send(lane.chunk([(0, 1)], PAGE))).ack.acknowledged == 1
    assert (await source.status()).state == RECEIVING


async def test_a_repeated_frame_is_acknowledged_and_not_applied(lane: Lane, source: RawSource) -> None:
    """A frame that was taken in before changes nothing any more, whatever it carries now."""
    first = lane.chunk([(7, 1)], PAGE)
    assert (await lane.send(first)).ack.acknowledged == 1
    forged = Lane(lane.call).chunk([(7, 1)], b"\x5a" * PAGE_SIZE)
    for repeated in (first, forged):
        assert (await lane.send(repeated)).ack.acknowledged == 1
    memory = source.to.directory.paths(source.spec).ram.read_bytes()
    assert memory[7 * PAGE_SIZE : 8 * PAGE_SIZE] == PAGE
    assert (await lane.send(lane.end())).ended.frames == 1


async def test_a_frame_after_the_end_is_refused(lane: Lane) -> None:
    """A lane that has ended takes nothing in, on no connection."""
    assert (await lane.send(lane.end())).WhichOneof("message") == "ended"
    with pytest.raises(VmferryError, match="after the lane's end") as caught:
        await lane.send(lane.chunk([(0, 1)], PAGE))
    assert caught.value.reason == "STREAM_BROKEN"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"frames": 2}, "STREAM_BROKEN"),
        ({"data_bytes": 1}, "STREAM_BROKEN"),
        ({"digest": bytes(16)}, "HASH_MISMATCH"),
        ({"frames": MAX_U64}, "STREAM_BROKEN"),
    ],
)
async def test_an_end_that_counts_differently_is_refused(
    lane: Lane, source: RawSource, changes: dict[str, Any], reason: str
) -> None:
    """A lane is whole only if both ends agree on frames, bytes and digest; the right end still ends it."""
    await lane.send(lane.chunk([(1, 1)], PAGE))
    right = lane.end()
    with pytest.raises(VmferryError) as caught:
        await lane.send(lane.end(**changes))
    assert caught.value.reason == reason
    again = await source.open_lane()
    assert (await again.send(right)).ended.frames == 1


async def test_only_the_attempts_own_lanes_open(source: RawSource) -> None:
    """A wrong secret, a wrong attempt, a lane too many, or no opening at all is refused by name."""
    await source.begin()
    for changes, reason, field in (
        ({"transfer_token": bytes(32)}, "PERMISSION_DENIED", "transfer_token"),
        ({"transfer_token": b""}, "PERMISSION_DENIED", "transfer_token"),
        ({"migration_id": bytes(16)}, "ATTEMPT_NOT_FOUND", "open.migration_id"),
        ({"lane": 2}, "INVALID_ARGUMENT", "open.lane"),
        ({"lane": 2**32 - 1}, "INVALID_ARGUMENT", "open.lane"),
    ):
        with pytest.raises(VmferryError) as caught:
            await source.open_lane(**changes)
        assert (caught.value.reason, caught.value.field) == (reason, field), changes
    for first in (Request(), Request(end=transfer_pb2.LaneEnd())):
        call: Any = source.stub.Transfer(timeout=5)  # type: ignore[call-arg]  # written to by hand
        with pytest.raises(VmferryError) as caught:
            await Lane(call).send(first)
        assert (caught.value.reason, caught.value.field) == ("INVALID_ARGUMENT", "open")


async def test_an_opening_in_the_middle_of_a_lane_is_refused(lane: Lane) -> None:
    """A lane is opened once per connection."""
    with pytest.raises(VmferryError) as caught:
        await lane.send(Request(open=transfer_pb2.LaneOpen(lane=0)))
    assert caught.value.reason == "STREAM_BROKEN"


async def test_an_older_connection_of_a_lane_is_sent_away(lane: Lane, source: RawSource) -> None:
    """When a lane was reopened, what still comes over its older connection is not taken in."""
    newer = await source.open_lane()
    with pytest.raises(VmferryError) as caught:
        await lane.send(lane.chunk([(0, 1)], PAGE))
    assert caught.value.reason == "STALE_ATTEMPT"
    assert (await newer.send(newer.chunk([(0, 1)], PAGE))).ack.acknowledged == 1


async def test_the_end_of_a_stream_is_not_the_end_of_a_lane(lane: Lane, source: RawSource) -> None:
    """A stream that just ends means nothing: sealing is refused by name, and the right end still works."""
    state = source.model.device_state
    await lane.send(lane.device_state(0, len(state), state))
    await lane.call.done_writing()
    assert await lane.call.read() is END_OF_STREAM
    second = await source.open_lane(1)
    await second.send(second.end())
    error = await refusal(source.seal())
    assert error.reason == "STREAM_BROKEN"
    assert "[0]" in error.message
    again = await source.open_lane()
    await again.send(lane.end())
    assert (await source.seal()).status.state == PREPARED


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([(0, 0, b"x")], "CHUNK_REJECTED"),
        ([(0, 64 * 2**20 + 1, b"x")], "CHUNK_REJECTED"),
        ([(0, MAX_U64, b"x")], "CHUNK_REJECTED"),
        ([(0, 4, b"")], "CHUNK_REJECTED"),
        ([(3, 4, b"xx")], "CHUNK_REJECTED"),
        ([(MAX_U64, 4, b"x")], "CHUNK_REJECTED"),
        ([(0, 8, b"xxxx"), (4, 9, b"xxxx")], "CHUNK_REJECTED"),
        ([(0, 8, b"xxxx"), (2, 8, b"xxxx")], "CHUNK_REJECTED"),
        ([(0, 8, b"xxxx"), (0, 8, b"yyyy")], "CHUNK_REJECTED"),
        ([(4, 8, b"xxxx"), (2, 8, b"xxxx")], "CHUNK_REJECTED"),
    ],
)
async def test_device_state_that_does_not_fit_together_is_refused(
    lane: Lane, pieces: list[tuple[int, int, bytes]], reason: str
) -> None:
    """Sizes that no device state has, and pieces that lie outside or over each other, are refused at once."""
    for piece in pieces[:-1]:
        await lane.send(lane.device_state(*piece))
    with pytest.raises(VmferryError) as caught:
        await lane.send(lane.device_state(*pieces[-1]))
    assert caught.value.reason == reason


async def test_device_state_in_crumbs_is_refused(lane: Lane) -> None:
    """A device state is not kept in so many pieces that they cost more than it is worth."""

    async def send_crumbs() -> None:
        for offset in range(10_000):
            await lane.send(lane.device_state(offset, 10_000, b"x"))

    with pytest.raises(VmferryError) as caught:
        await send_crumbs()
    assert caught.value.reason == "CHUNK_REJECTED"
    assert lane.sequence < 5_000


async def test_device_state_that_the_hypervisor_refuses_is_not_prepared(
    lane: Lane, source: RawSource
) -> None:
    """Rubbish, rightly hashed and sealed, ends the attempt by name; nothing of it runs."""
    rubbish = b"no device state at all"
    source.model = Model(source.model.spec, rubbish)
    await lane.send(lane.device_state(0, len(rubbish), rubbish))
    await lane.send(lane.end())
    second = await source.open_lane(1)
    await second.send(second.end())
    error = await refusal(source.seal())
    assert error.reason == "MACHINE_FAILED"
    assert (await source.status()).state in {RECEIVING, REFUSED}
    assert (await source.abort()).state == REFUSED


async def test_missing_device_state_is_not_prepared(lane: Lane, source: RawSource) -> None:
    """Without any device state there is nothing to seal."""
    await lane.send(lane.end())
    second = await source.open_lane(1)
    await second.send(second.end())
    assert (await refusal(source.seal())).reason == "STREAM_BROKEN"
