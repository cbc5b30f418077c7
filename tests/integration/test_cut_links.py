"""A network that is hurt at every named moment of a migration, services killed behind it, and services that sleep.

The service that comes to the place is held there while the network is hurt, so the fault strikes between two steps,
never beside them. When the effect shows (the source gave the machine back, knows the outcome, or says that it is
unknown), the network heals; then nobody may need help.

Without ``VMFERRY_SOAK`` every fault strikes in the moments that decide and in turns everywhere else; with it, every
fault strikes at every place. The name of a test is all that is needed to run it again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import grpc
import grpc.aio
import pytest

from tests.integration.faults import Fault
from tests.integration.hosts import Guest, World, open_world
from tests.integration.places import (
    HELD_S,
    ON_FAILURE,
    PLACES,
    Evidence,
    all_is_well,
    armed,
    collecting,
    guest_in_peace,
    halted,
    held,
)
from tests.integration.proxy import Proxy
from tests.integration.services import DEADLINE_S, eventually
from vmferry.errors import ExitCode
from vmferry.handoff.rights import Standing
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(300)]

SOAK = bool(os.environ.get("VMFERRY_SOAK"))
PHASES = {
    "begin": ("source.recorded.begun", "dest.recorded.accepted", "dest.copy-started", "source.accepted"),
    "pre-copy": ("source.tracking", "dest.frame-taken", "source.round-sent"),
    "pause": ("source.paused", "source.last-round-sent", "source.state-saved"),
    "seal": ("source.recorded.sealed", "dest.loaded", "dest.verified", "dest.recorded.prepared"),
    "ready": ("source.ready-heard", "source.recording.handed-off", "source.recorded.handed-off"),
    "go": ("dest.recording.owned",),
    "owned": ("dest.recorded.owned", "dest.resumed"),
    "ran": ("dest.recorded.ran", "dest.released"),
    "done": ("source.outcome-heard", "source.recorded.done", "source.released"),
    "given up": tuple(sorted(ON_FAILURE)),
}
"""The places in the order of a migration."""
BEFORE = ("begin", "pre-copy", "pause", "seal")
UNANSWERED = ("ready", "go", "owned", "ran")
GIVEN_UP = "source.recorded.handed-off"
TAKEN = "dest.recorded.owned"
"""The places between which nobody can know; what the source says is of no importance any more at the second one."""


def in_turns(places: Iterable[str], faults: Sequence[Fault]) -> list[tuple[Fault, str]]:
    """Each place with one fault, each fault as often as the others."""
    return list(zip(itertools.cycle(faults), places, strict=False))


ORDER = tuple(place for places in PHASES.values() for place in places)
TOTAL = (Fault.LOST, Fault.CUT)
if SOAK:
    HURT = [(fault, place) for place in ORDER for fault in Fault]
    KILLED = [(fault, place) for place in ORDER for fault in TOTAL]
    ASLEEP = [(place, woken) for place in ORDER for woken in ("source", "both")]
    AGAIN = [place for phase in BEFORE for place in PHASES[phase]]
    SAID = [Fault.LOST, Fault.CUT, Fault.LATE_DOWN]
else:
    DOWN = (Fault.LOST_DOWN, Fault.LATE_DOWN, Fault.CUT, Fault.CLOSED_DOWN, Fault.SLOW_DOWN)
    HURT = [*((fault, GIVEN_UP) for fault in Fault), *((fault, TAKEN) for fault in DOWN)]
    HURT += in_turns((places[0] for places in PHASES.values() if TAKEN not in places), tuple(Fault))
    KILLED = in_turns(("source.recorded.sealed", "dest.recorded.prepared", GIVEN_UP, TAKEN), TOTAL)
    ASLEEP = [(GIVEN_UP, "source"), ("dest.recorded.prepared", "both"), (TAKEN, "both")]
    AGAIN = ["dest.recorded.prepared"]
    SAID = [Fault.LOST]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """Of when guests executed."""
    with collecting(tmp_path_factory.mktemp("activity")) as evidence:
        yield evidence


@pytest.fixture(scope="module")
async def world(evidence: Evidence) -> AsyncIterator[World]:
    """Hosts whose hypervisors leave evidence, and whose services do not wait long for each other."""
    assert evidence
    async with open_world(
        rpc_timeout_s=1.5,
        stall_timeout_s=2.0,
        switch_timeout_s=3.0,
        reserve_timeout_s=4.0,
        negotiate_timeout_s=10.0,
    ) as opened:
        yield opened


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A canary on host a, and services that run in peace again afterwards."""
    async with guest_in_peace(world) as guest:
        yield guest


async def shown(world: World, migration_id: str) -> pb.Migration:
    """What the source says once it has noticed that something is wrong, or that all is over."""
    return await world.reaches(
        world.a,
        migration_id,
        lambda now: now.phase == pb.MIGRATION_PHASE_ENDED or now.outcome == pb.MIGRATION_OUTCOME_UNKNOWN,
        "the effect shows",
    )


async def assert_honest(world: World, guest: Guest, now: pb.Migration) -> None:
    """What the source says of the outcome is what its journal allows to say."""
    match now.outcome:
        case pb.MIGRATION_OUTCOME_UNKNOWN:
            assert now.phase == pb.MIGRATION_PHASE_HANDING_OFF, now
            assert now.reason.reason == "OUTCOME_UNKNOWN", now
            assert now.owner == "", now
        case pb.MIGRATION_OUTCOME_COMPLETED:
            assert now.owner == world.b.identity.uri, now
            assert world.b.ledger.rights(guest.id).permitted
        case _:
            assert now.owner == world.a.identity.uri, now
            assert world.a.ledger.rights(guest.id).permitted, (
                "it failed, and the machine does not belong here"
            )
            await guest.assert_clean(world.a)


async def assert_paused(world: World, guest: Guest) -> None:
    """Nobody at the source can know, so nothing runs there."""
    assert world.a.ledger.rights(guest.id).standing is Standing.HANDED_OFF
    machine = await world.machine(world.a, guest)
    assert machine.right == machine_pb2.MACHINE_RIGHT_HANDED_OFF
    assert machine.state == machine_pb2.MACHINE_STATE_PAUSED


def expected(place: str) -> pb.MigrationOutcome.ValueType | None:
    """What has to be said while nothing at all gets through from this place on; None if two truths are possible."""
    phase = next(phase for phase, places in PHASES.items() if place in places)
    if place == "dest.released":  # the answer is on its way meanwhile
        return None
    if phase in BEFORE:
        return pb.MIGRATION_OUTCOME_FAILED
    if phase in UNANSWERED:
        return pb.MIGRATION_OUTCOME_UNKNOWN
    return pb.MIGRATION_OUTCOME_COMPLETED if phase == "done" else pb.MIGRATION_OUTCOME_CANCELLED


async def assert_mended(world: World, guest: Guest, link: Proxy, evidence: Evidence) -> None:
    """All settles by itself, and the machine migrates again, over the same network if that is its way."""
    owner, other = await all_is_well(world, guest, evidence)
    way = {"address": link.address} if owner is world.a else {}
    await world.assert_crosses(guest, owner, other, **way)
    evidence.assert_no_two_at_once(guest)


def test_every_place_belongs_to_a_phase() -> None:
    """No named place is left out."""
    assert sorted(ORDER) == sorted(PLACES)


@pytest.mark.parametrize(("fault", "place"), HURT)
async def test_a_network_that_is_hurt_leaves_one_copy_and_one_truth(
    world: World, guest: Guest, link: Proxy, evidence: Evidence, fault: Fault, place: str
) -> None:
    """While it lasts, nobody says more than is known; once it is over, all settles by itself."""
    async with armed(world, place, "stop") as service:
        migration_id = await held(world, guest, link, place, service)
        fault.strike(link)
        service.signal(signal.SIGCONT)
        if fault.lasts:
            now = await shown(world, migration_id)
            await assert_honest(world, guest, now)
            if fault.total:
                assert expected(place) in (None, now.outcome), now
            if fault.total and now.outcome == pb.MIGRATION_OUTCOME_UNKNOWN:
                await assert_paused(world, guest)
        fault.heal(link)
    await assert_mended(world, guest, link, evidence)


@pytest.mark.parametrize(("fault", "place"), KILLED)
async def test_a_service_killed_behind_a_cut_link_settles_it_when_both_are_mended(
    world: World, guest: Guest, link: Proxy, evidence: Evidence, fault: Fault, place: str
) -> None:
    """Its next process finds nobody to talk to, and neither guesses nor gives up."""
    async with armed(world, place, "stop") as service:
        migration_id = await held(world, guest, link, place, service)
        fault.strike(link)
        await service.kill()
        await service.start()
        try:
            await assert_honest(world, guest, await shown(world, migration_id))
        except grpc.aio.AioRpcError as error:  # nothing was open any more, or not yet, when it was killed
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        fault.heal(link)
    await assert_mended(world, guest, link, evidence)


@pytest.mark.parametrize(("place", "woken"), ASLEEP)
async def test_two_services_that_sleep_wake_up_to_one_truth(
    world: World, guest: Guest, link: Proxy, evidence: Evidence, place: str, woken: str
) -> None:
    """Both are stopped for longer than they wait for each other; the source wakes first, or both at once."""
    services = (world.a.source, world.b.dest)
    async with armed(world, place, "stop") as service:
        migration_id = await held(world, guest, link, place, service)
        for other in services:
            other.signal(signal.SIGSTOP)
        await eventually(lambda: all(map(halted, services)), "both are stopped")
        await asyncio.sleep(HELD_S)
        world.a.source.signal(signal.SIGCONT)
        if woken == "source":
            await assert_honest(world, guest, await shown(world, migration_id))
        world.b.dest.signal(signal.SIGCONT)
    await assert_mended(world, guest, link, evidence)


@pytest.mark.parametrize("place", AGAIN)
async def test_a_machine_that_was_given_back_leaves_by_another_way_at_once(
    world: World, guest: Guest, link: Proxy, evidence: Evidence, place: str
) -> None:
    """The destination was never told of the end; the next attempt takes the place of what it still holds."""
    async with armed(world, place, "stop") as service:
        migration_id = await held(world, guest, link, place, service)
        Fault.LOST.strike(link)
        service.signal(signal.SIGCONT)
        assert (await shown(world, migration_id)).outcome == pb.MIGRATION_OUTCOME_FAILED
        await world.assert_crosses(guest, world.a, world.b)
    link.heal()
    await world.assert_crosses(guest, world.b, world.a)
    await world.assert_stays(guest, world.a, world.b)
    evidence.assert_no_two_at_once(guest)


IMPATIENT = (
    "import sys; from vmferry.security.tls13 import enforce_tls13; enforce_tls13()\n"
    "import vmferry.cli.watch as w; w.PATIENCE = w.Patience(unknown_s=0.5)\n"
    "from vmferry.cli.main import main; sys.exit(main())"
)
"""The command, which waits less long for an unknown outcome to become known."""


async def command(world: World, *words: str) -> asyncio.subprocess.Process:
    """Begin a command of a scheduler at host a's source."""
    connection = ("--source", world.a.source.address, "--source-host", world.a.identity.uri)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", IMPATIENT, *words, *connection, "--tls", str(world.tls_dir("controller"))),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def said(process: asyncio.subprocess.Process) -> str:
    """What a command printed; it is ended if it does not end."""
    try:
        async with asyncio.timeout(2 * DEADLINE_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode()


@pytest.mark.parametrize("fault", SAID)
async def test_a_command_says_unknown_and_never_failed_after_the_hand_off(
    world: World, guest: Guest, link: Proxy, evidence: Evidence, fault: Fault
) -> None:
    """``vmferry migrate`` and ``vmferry watch`` end with the exit code for *unknown* while Go has no answer."""
    async with armed(world, GIVEN_UP, "stop") as service:
        migrate = await command(
            world, "migrate", guest.spec.name, "--to-host", world.b.identity.uri, "--to-address", link.address
        )
        try:
            await eventually(lambda: halted(service) or migrate.returncode, "the right is given up")
        finally:
            fault.strike(link)
            service.signal(signal.SIGCONT)
            output = await said(migrate)
        assert migrate.returncode == ExitCode.UNKNOWN, output
        assert "unknown" in output
        async with world.source(world.a) as stub:
            answer = await stub.ListMigrations(pb.ListMigrationsRequest(machine=guest.id), timeout=DEADLINE_S)
        watch = await command(world, "watch", answer.migrations[0].id)
        output = await said(watch)
        assert watch.returncode == ExitCode.UNKNOWN, output
        await assert_paused(world, guest)
        fault.heal(link)
    await assert_mended(world, guest, link, evidence)
