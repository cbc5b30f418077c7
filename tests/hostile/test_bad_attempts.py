"""A host with a valid certificate that begins, seals and hands over attempts as it must not.

After each offence, told by name, the destination holds nothing of the attempt once it is closed, nothing runs that
was not handed over, and another guest of these hosts has taken no harm and can still be moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from functools import reduce
from typing import Any

import grpc.aio
import pytest

from tests.hostile.raw_source import (
    MEMORY_MIB,
    Model,
    RawSource,
    raw_source,
)
from tests.integration.hosts import Bystander, World, configured
from tests.integration.services import DOMAIN, eventually, refusal
from vmferry.machines.wire import spec_to_message
from vmferry.memory.runs import PAGE_SIZE
from vmferry.security.identity import Identity, Kind
from vmferry.security.tls import open_channel
from vmferry.v1 import handoff_pb2
from vmferry.v1.handoff_pb2_grpc import DestinationServiceStub

pytestmark = pytest.mark.usefixtures("tidy")

PAGE = b"\xa5" * PAGE_SIZE
RECEIVING, PREPARED = handoff_pb2.ATTEMPT_STATE_RECEIVING, handoff_pb2.ATTEMPT_STATE_PREPARED
RUNNING, REFUSED = handoff_pb2.ATTEMPT_STATE_RUNNING, handoff_pb2.ATTEMPT_STATE_REFUSED
MAX_U64 = 2**64 - 1


async def test_a_wrong_digest_ends_the_attempt(source: RawSource) -> None:
    """What is not what the source sealed is dropped at once, and no Go brings it back."""
    await source.begin()
    await source.send_everything()
    assert (await refusal(source.seal(digest=bytes(32)))).reason == "HASH_MISMATCH"
    assert (await source.status()).state == REFUSED
    assert not source.to.holdings(source.spec)
    assert (await source.go()).state == REFUSED


async def test_go_runs_only_what_is_prepared_and_sealed(source: RawSource) -> None:
    """Go before Seal, with another digest, epoch, attempt, migration or incarnation runs nothing."""
    await source.begin()
    assert (await source.go()).state == RECEIVING
    await source.send_everything()
    assert (await source.go()).state == RECEIVING
    assert (await source.seal()).status.state == PREPARED
    assert (await refusal(source.go(digest=bytes(32)))).reason == "STALE_ATTEMPT"
    assert (await refusal(source.go(digest=b""))).reason == "STALE_ATTEMPT"

    def other(**changes: Any) -> handoff_pb2.AttemptRef:
        ref = handoff_pb2.AttemptRef()
        ref.CopyFrom(source.ref)
        for name, value in changes.items():
            setattr(ref, name, value)
        return ref

    for changes in (
        {"attempt": 2},
        {"attempt": MAX_U64},
        {"epoch_from": 2, "epoch_to": 3},
        {"epoch_from": 0, "epoch_to": 1},
        {"epoch_from": MAX_U64 - 1, "epoch_to": MAX_U64},
        {"migration_id": bytes(16)},
        {"source_incarnation": str(uuid.uuid4())},
        {"machine_id": str(uuid.uuid4())},
    ):
        ref = other(**changes)
        status = await source.go(attempt=ref, digest=source.digest)
        assert status.state == handoff_pb2.ATTEMPT_STATE_UNSEEN, changes
    for changes in (
        {"epoch_to": 7},
        {"epoch_from": MAX_U64, "epoch_to": 0},
        {"migration_id": b"short"},
        {"machine_id": ""},
    ):
        error = await refusal(source.stub.Go(handoff_pb2.GoRequest(attempt=other(**changes))))
        assert error.reason == "INVALID_ARGUMENT", changes
        assert error.field.startswith("attempt"), changes
    lost = other(destination_incarnation=str(uuid.uuid4()))
    assert (await refusal(source.go(attempt=lost, digest=b""))).reason == "WRONG_PHASE"
    assert (await source.status()).state == PREPARED
    assert not source.to.ledger.rights(source.spec.uuid).permitted


async def test_go_twice_is_as_good_as_once_and_abort_comes_too_late(source: RawSource) -> None:
    """The commit point is passed once; afterwards every question is answered with RUNNING."""
    await source.begin()
    await source.send_everything()
    first = await source.seal()
    assert await source.seal() == first
    assert first.digest == source.digest
    assert (await source.go()).state == RUNNING
    assert (await source.go()).state == RUNNING
    assert (await source.abort()).state == RUNNING
    assert (await source.seal()).status.state == RUNNING
    assert (await refusal(source.begin())).reason == "WRONG_PHASE"
    assert (await source.status()).state == RUNNING
    await source.guest.assert_clean(source.to)
    await source.end_guest()


async def test_begin_twice_is_as_good_as_once(source: RawSource) -> None:
    """A repeated Begin gives the same secret and takes no more memory; the copy is still one."""
    first = await source.begin()
    held = source.to.holdings(source.spec)
    calls = [source.stub.Begin(source.begin_request()) for _ in range(5)]
    answers = [await call for call in calls]
    assert all(answer == first for answer in answers)
    assert source.to.holdings(source.spec) == held


async def test_an_older_attempt_does_not_replace_a_newer_one(source: RawSource) -> None:
    """Once attempt 5 was seen, attempts up to 5 are stale; the prepared copy stays as it is."""
    source.ref.attempt = 5
    await source.begin()
    await source.send_everything()
    await source.seal()
    for number in (4, 1, 0):
        older = handoff_pb2.AttemptRef()
        older.CopyFrom(source.ref)
        older.attempt = number
        ticket = source.world.ticket(
            source.guest, source.world.a, source.to, migration_id=source.ref.migration_id
        )
        error = await refusal(source.stub.Begin(source.begin_request(attempt=older, ticket=ticket)))
        assert error.reason == "STALE_ATTEMPT"
        assert error.field == "attempt.attempt"
        stale = handoff_pb2.SealRequest(attempt=older, digest=source.digest)
        assert (await refusal(source.stub.Seal(stale))).reason == "WRONG_PHASE"
    assert (await source.status()).state == PREPARED
    assert (await source.go()).state == RUNNING
    await source.guest.assert_clean(source.to)
    await source.end_guest()


async def test_a_ticket_is_burnt_by_the_attempt_that_used_it(source: RawSource) -> None:
    """A new attempt with an old ticket is refused, also when the old attempt is closed."""
    await source.begin()
    assert (await source.abort()).state == REFUSED
    again = handoff_pb2.AttemptRef()
    again.CopyFrom(source.ref)
    again.attempt = 2
    error = await refusal(source.stub.Begin(source.begin_request(attempt=again)))
    assert error.reason == "TICKET_USED"


HOSTILE_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "a path as name": ({"name": "../../etc"}, "spec.name"),
    "a NUL in the name": ({"name": "a\0b"}, "spec.name"),
    "an empty name": ({"name": ""}, "spec.name"),
    "a long name": ({"name": "a" * 64}, "spec.name"),
    "letters that look alike": ({"name": "vm-\u0430"}, "spec.name"),
    "another machine": ({"uuid": str(uuid.uuid4())}, "spec.uuid"),
    "another hypervisor": ({"kind": "qemu"}, "spec.microvm"),
    "more memory": ({"memory_mib": MEMORY_MIB + 1}, "max_memory_bytes"),
    "no memory": ({"memory_mib": 0}, "spec.memory_mib"),
    "all memory": ({"memory_mib": 2**32 - 1}, "spec.memory_mib"),
    "many processors": ({"vcpus": 10**6}, "spec.vcpus"),
    "an option as program": ({"microvm.program": "--ram-file=/etc/shadow"}, "spec.microvm.program"),
    "a broadcast address": ({"microvm.mac": "ff:ff:ff:ff:ff:ff"}, "spec.microvm.mac"),
    "a socket of the host": ({"microvm.netdev": "dgram:unix:/run/systemd/notify"}, "spec.microvm.netdev"),
    "a path with dots": ({"microvm.netdev": "dgram:unix:/tmp/../run/x"}, "spec.microvm.netdev"),
    "somebody's port": ({"microvm.netdev": "dgram:192.0.2.1:53"}, "spec.microvm.netdev"),
    "a tap device": ({"microvm.netdev": "tap,ifname=eth0"}, "spec.microvm.netdev"),
    "a future version": ({"version": 99}, "spec.version"),
}


@pytest.mark.parametrize("offence", HOSTILE_SPECS)
async def test_a_description_that_reaches_into_the_host_is_refused(
    world: World, model: Model, offence: str
) -> None:
    """Names, paths and numbers of a description are checked before anything is made, by name."""
    changes, field = HOSTILE_SPECS[offence]
    async with raw_source(world, world.b, model) as source:
        spec = spec_to_message(source.spec)
        for name, value in changes.items():
            *path, last = name.split(".")
            setattr(reduce(getattr, path, spec), last, value)
        error = await refusal(source.stub.Begin(source.begin_request(spec=spec)))
        assert error.reason in {"INVALID_ARGUMENT", "TICKET_INVALID"}
        assert error.field == field
        assert not world.b.holdings(source.spec)
        assert (await source.status()).state == handoff_pb2.ATTEMPT_STATE_UNSEEN
        assert source.spec.uuid not in world.b.ledger.machines()


async def test_params_that_no_guest_has_end_the_attempt(source: RawSource) -> None:
    """What only the hypervisor can judge is refused by it, and leaves nothing."""
    spec = spec_to_message(source.spec)
    spec.microvm.params["no-such-parameter"] = "1"
    error = await refusal(source.stub.Begin(source.begin_request(spec=spec)))
    assert error.reason == "MACHINE_FAILED"
    assert (await source.status()).state == REFUSED


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lanes": 0}, "lanes"),
        ({"lanes": 1}, "lanes"),
        ({"lanes": 17}, "lanes"),
        ({"protocol_version": 0}, "protocol_version"),
        ({"protocol_version": 3}, "protocol_version"),
        ({"path": "by air"}, "path"),
        ({"path": "stream"}, "path"),
        ({"path": "stream", "protocol_version": 2}, "path"),
        ({"regions": []}, "regions"),
        ({"regions": [handoff_pb2.RegionLayout(name="ram", size_bytes=MAX_U64)]}, "regions"),
        ({"regions": [handoff_pb2.RegionLayout(name="rom", size_bytes=MEMORY_MIB << 20)]}, "regions"),
        ({"regions": [handoff_pb2.RegionLayout(name="ram", size_bytes=MEMORY_MIB << 20)] * 2}, "regions"),
    ],
)
async def test_begin_names_the_field_that_is_wrong(
    world: World, model: Model, changes: dict[str, Any], field: str
) -> None:
    """Lanes, version and layout are checked before memory is promised."""
    async with raw_source(world, world.b, model) as source:
        error = await refusal(source.stub.Begin(source.begin_request(**changes)))
        assert (error.reason, error.field) == ("INVALID_ARGUMENT", field)
        assert source.spec.uuid not in world.b.ledger.machines()


@pytest.mark.parametrize(
    "machine_id",
    ["", "../../../etc/passwd", "a\0b", "x" * 100_000, str(uuid.uuid4()).upper()],
    ids=["empty", "path", "zero byte", "long", "upper case"],
)
async def test_an_identity_that_is_none_goes_nowhere_near_a_file(
    world: World, model: Model, machine_id: str
) -> None:
    """Every call about an attempt refuses an identity that is not a lower-case UUID, naming the field."""
    before = sorted(path.name for path in world.b.config.journal_dir.iterdir())
    async with raw_source(world, world.b, model) as source:
        source.ref.machine_id = machine_id
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: source.stub.Begin(source.begin_request()),
            lambda: source.stub.Seal(handoff_pb2.SealRequest(attempt=source.ref)),
            lambda: source.stub.Go(handoff_pb2.GoRequest(attempt=source.ref)),
            lambda: source.stub.GetAttempt(handoff_pb2.GetAttemptRequest(attempt=source.ref)),
            lambda: source.stub.Abort(handoff_pb2.AbortRequest(attempt=source.ref)),
        )
        for call in calls:
            error = await refusal(call())
            assert (error.reason, error.field) == ("INVALID_ARGUMENT", "attempt.machine_id")
    assert sorted(path.name for path in world.b.config.journal_dir.iterdir()) == before


@pytest.mark.parametrize("name", ["source_incarnation", "destination_address"])
async def test_names_that_no_journal_could_hold_are_refused(world: World, model: Model, name: str) -> None:
    """A field of a megabyte ends in a named error, not in a broken journal."""
    async with raw_source(world, world.b, model) as source:
        setattr(source.ref, name, "x" * 1_000_000)
        error = await refusal(source.stub.Begin(source.begin_request()))
        assert error.reason == "INVALID_ARGUMENT"
        assert name in error.field
        assert not world.b.holdings(source.spec)


async def test_calls_about_an_unknown_attempt_leave_nothing(world: World, model: Model) -> None:
    """Seal, Go and a question about a machine nobody ever sent make no journal, and no Go makes an owner."""
    async with raw_source(world, world.b, model) as source:
        assert (await source.status()).state == handoff_pb2.ATTEMPT_STATE_UNSEEN
        assert (await source.go()).state == handoff_pb2.ATTEMPT_STATE_UNSEEN
        assert (await refusal(source.seal())).reason == "WRONG_PHASE"
        assert source.spec.uuid not in world.b.ledger.machines()


async def test_a_begin_whose_caller_goes_away_leaves_nothing(
    world: World, bystander: Bystander, model: Model
) -> None:
    """Hung up at any moment, an attempt is closed by its Abort or by itself, and the next one is taken."""
    for delay_ms in (0, 2, 5, 10, 20, 50, 100, 200, 400):
        async with raw_source(world, world.b, model) as source:
            source.world.guests.append(source.guest)
            call: Any = source.stub.Begin(source.begin_request())
            await asyncio.sleep(delay_ms / 1000)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            assert (await source.abort()).state == REFUSED
        await source.until_nothing_is_held()
    await bystander.assert_unharmed()


async def test_an_attempt_that_falls_silent_is_closed(
    world: World, bystander: Bystander, model: Model
) -> None:
    """Nothing for longer than receive_timeout_s closes an attempt; a prepared copy waits on for ever."""
    async with raw_source(world, world.b, model) as silent, raw_source(world, world.b, model) as prepared:
        await silent.begin()
        await prepared.begin()
        await prepared.send_everything()
        await prepared.seal()
        limit_s = world.b.config.receive_timeout_s
        await eventually(lambda: not world.b.holdings(silent.spec), "it is closed", seconds=limit_s + 20)
        assert (await silent.status()).state == REFUSED
        await asyncio.sleep(2)  # longer than the destination's look at its attempts: here nothing may happen
        assert (await prepared.status()).state == PREPARED
        assert (await prepared.abort()).state == REFUSED
    await bystander.assert_unharmed()


async def test_two_attempts_fill_a_host_and_a_third_is_told_so(
    world: World, bystander: Bystander, model: Model
) -> None:
    """max_incoming is counted over all sources; when one is closed there is room again."""
    async with (
        raw_source(world, world.b, model) as one,
        raw_source(world, world.b, model) as two,
        raw_source(world, world.b, model) as three,
    ):
        await one.begin()
        await two.begin()
        error = await refusal(three.stub.Begin(three.begin_request()))
        assert error.reason == "TOO_MANY_MIGRATIONS"
        assert error.metadata["limit"] == "max_incoming"
        assert three.spec.uuid not in world.b.ledger.machines()
        await one.abort()
        await three.begin()
    await bystander.assert_unharmed()


async def test_a_host_that_is_emptied_refuses_all_the_same(
    world: World, bystander: Bystander, model: Model
) -> None:
    """A source that does not ask beforehand is told at its Begin, and nothing is recorded of it."""
    async with configured(world.b.dest, draining=True), raw_source(world, world.b, model) as source:
        error = await refusal(source.stub.Begin(source.begin_request()))
        assert error.reason == "HOST_DRAINING"
        assert source.spec.uuid not in world.b.ledger.machines()
    await bystander.assert_unharmed()


async def test_a_host_without_a_ticket_cannot_close_what_is_anothers(
    world: World, bystander: Bystander, model: Model
) -> None:
    """An Abort of an attempt that was never begun, by a host with no ticket, stands in nobody else's way."""
    async with (
        raw_source(world, world.b, model) as source,
        open_channel(world.b.dest.address, world.b.identity, world.material("c")) as channel,
    ):
        stub = DestinationServiceStub(channel)
        forged = handoff_pb2.AttemptRef(
            machine_id=source.spec.uuid,
            migration_id=bytes(16),
            attempt=1,
            epoch_from=2**62,
            epoch_to=2**62 + 1,
            source=Identity(DOMAIN, Kind.VMHOST, "c").uri,
            destination=world.b.identity.uri,
        )

        async def close() -> None:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.Abort(handoff_pb2.AbortRequest(attempt=forged, reason="spite"), timeout=5)

        await close()
        await source.begin()
        forged.migration_id = bytes(15) + b"x"
        await close()
        assert (await source.status()).state == RECEIVING
        await source.send_everything()
        assert (await source.seal()).status.state == PREPARED
        forged.migration_id = bytes(15) + b"y"
        forged.epoch_from, forged.epoch_to = 2**62 + 1, 2**62 + 2
        await close()
        assert (await source.status()).state == PREPARED
    await bystander.assert_unharmed()
