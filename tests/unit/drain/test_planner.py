"""The planner of a drain: for every situation what it promises, and step by step what an operator may expect."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from tests.unit.drain.situations import GIB, NOW, facts, machine, prospect
from vmferry.drain.planner import (
    LONGEST_REST_S,
    Consequence,
    Facts,
    Failures,
    Machine,
    Placed,
    Prospect,
    Standing,
    consequence,
    costs_of,
    decide,
)
from vmferry.errors import catalogue

HOSTS = ("b", "c", "d")


def test_the_cheapest_go_first_and_to_different_hosts() -> None:
    """Order by predicted cost; of two equal hosts the one with fewer of ours on their way."""
    found = decide(facts([machine("dear", 9.0), machine("cheap", 1.0), machine("middle", 5.0)]))

    assert [name for name, _ in found.start] == ["cheap", "middle"]
    assert {host for _, host in found.start} == {"b", "c"}
    assert found.stays == frozenset()


def test_nothing_begins_before_everybody_was_asked_about() -> None:
    """The order means something only once all costs and reports are there."""
    situation = facts([machine("one"), machine("two")])
    partly = {pair: known for pair, known in situation.prospects.items() if pair != ("two", "c")}

    found = decide(replace(situation, prospects=partly))

    assert found.start == []
    assert list(found.ask) == [("two", "c")]


def test_memory_that_is_spoken_for_is_not_given_twice() -> None:
    """A host with room for one takes one, and the next goes elsewhere or waits until it has been asked again."""
    machines = [machine("one", gib=3), machine("two", gib=3), machine("three", gib=3)]
    rooms = {(one.id, host): prospect(gib=4) for one in machines for host in ("b", "c")}

    found = decide(facts(machines, room=3, prospects=rooms))

    assert sorted(host for _, host in found.start) == ["b", "c"]
    sent = [Placed("b", 3 * GIB, NOW - 2, under_way=False)]  # before it was asked: its answer knows of it
    assert len(decide(facts(machines, room=3, prospects=rooms, placed=sent)).start) == 2
    sent = [Placed("b", 3 * GIB, NOW, under_way=False)]  # afterwards
    assert [host for _, host in decide(facts(machines, room=3, prospects=rooms, placed=sent)).start] == ["c"]


def test_a_machine_that_failed_somewhere_goes_elsewhere_first() -> None:
    """Also when its rest there is over; and it goes there again if there is nowhere else."""
    one = machine("one")
    failed = {("one", "b"): Failures(1, NOW - 1000)}

    assert decide(facts([one], pairs=failed)).start == [("one", "c")]
    assert decide(facts([one], hosts=("b",), pairs=failed)).start == [("one", "b")]


def test_a_host_that_died_rests_for_all_and_not_for_ever() -> None:
    """Nobody is sent there, nobody asks it, and it is tried again later."""
    machines = [machine("one"), machine("two")]
    dead = {"b": Failures(1, NOW - 1)}

    found = decide(replace(facts(machines), hosts=dead))
    later = decide(replace(facts(machines), hosts=dead, now_s=NOW + 29, fresh_s=100.0))

    assert {host for _, host in found.start} == {"c"}
    assert found.wake_s <= NOW + 29
    assert {host for _, host in later.start} == {"b", "c"}


def test_what_no_host_takes_stays_and_is_stuck_unless_something_moves() -> None:
    """A report that rules a machine out keeps it here; a host that is only full keeps it waiting."""
    machines = [machine("one")]
    ruled_out = {("one", host): prospect(compatible=False) for host in ("b", "c")}
    full = {**ruled_out, ("one", "c"): prospect(compatible=False, passing=True)}

    stuck = decide(facts(machines, prospects=ruled_out))
    waits = decide(facts(machines, prospects=full))

    assert stuck.stays == {"one"}
    assert stuck.is_stuck(machines)
    assert not stuck.is_stuck([*machines, machine("two", standing=Standing.MOVING)])
    assert waits.stays == frozenset()
    assert not waits.is_stuck(machines)


def test_rests_grow_and_are_bounded() -> None:
    """The first is as configured; no number of failures makes one endless."""
    known = Failures()
    assert known.until_s(30.0) == 0.0
    lengths = []
    for _ in range(50):
        known = known.again(NOW)
        lengths.append(known.until_s(30.0) - NOW)
    assert lengths[:3] == [30.0, 90.0, 270.0]
    assert lengths == sorted(lengths)
    assert lengths[-1] == LONGEST_REST_S


def test_every_reason_of_the_catalogue_has_a_consequence() -> None:
    """A machine's own trouble is the pair's; a host's is the host's; on purpose is on purpose; busy is for later."""
    found = {reason: consequence(reason) for reason in catalogue()}

    assert found["NOT_CONVERGING"] is Consequence.ELSEWHERE
    assert found["INSUFFICIENT_MEMORY"] is Consequence.ELSEWHERE
    assert found["PEER_UNREACHABLE"] is Consequence.HOST
    assert found["HOST_DRAINING"] is Consequence.HOST
    assert found["TOO_MANY_MIGRATIONS"] is Consequence.LATER
    assert found["TICKET_EXPIRED"] is Consequence.LATER
    assert found["CANCELLED"] is Consequence.HELD
    assert consequence("OF_A_LATER_RELEASE") is Consequence.ELSEWHERE


def test_costs_that_were_not_measured_are_memory_at_a_usual_rate() -> None:
    """Measured and estimated ones can be compared."""
    assert costs_of({"one": 7.0}, {"one": GIB, "two": 200}, 100.0) == {"one": 7.0, "two": 2.0}


NAMES = st.sampled_from(["m1", "m2", "m3", "m4", "m5"])
PAIRS = st.tuples(NAMES, st.sampled_from(HOSTS))
TIMES = st.floats(NOW - 2000, NOW)
FAILED = st.builds(Failures, st.integers(0, 6), TIMES)


@st.composite
def situations(draw: st.DrawFn) -> Facts:
    """Any situation that a drain can be in."""
    names = draw(st.lists(NAMES, unique=True))
    machines = [
        Machine(name, draw(st.sampled_from(Standing)), draw(st.integers(1, 8)) * GIB, draw(st.floats(0, 100)))
        for name in names
    ]
    report = st.builds(
        Prospect,
        compatible=st.booleans(),
        room_bytes=st.integers(0, 20).map(lambda gib: gib * GIB),
        asked_at_s=TIMES,
        warnings=st.integers(0, 2),
        passing=st.booleans(),
    )
    return Facts(
        machines,
        draw(st.lists(st.sampled_from(HOSTS), unique=True)),
        draw(st.dictionaries(PAIRS, report))
        if draw(st.booleans())
        else {(name, host): draw(report) for name in names for host in HOSTS},
        now_s=NOW,
        room=draw(st.integers(0, 4)),
        rest_s=30.0,
        fresh_s=15.0,
        placed=draw(
            st.lists(
                st.builds(
                    Placed,
                    st.sampled_from(HOSTS),
                    st.integers(0, 8).map(lambda gib: gib * GIB),
                    TIMES,
                    under_way=st.booleans(),
                ),
                max_size=4,
            )
        ),
        pairs=draw(st.dictionaries(PAIRS, FAILED)),
        hosts=draw(st.dictionaries(st.sampled_from(HOSTS), FAILED)),
    )


@given(situations())
@settings(deadline=None, max_examples=300)
def test_whatever_the_situation_the_promises_hold(situation: Facts) -> None:
    """Limits, readiness, reports, rests and memory are kept; who stays has nowhere to go; it is repeatable."""
    found = decide(situation)
    assert found == decide(situation)
    by_id = {one.id: one for one in situation.machines}
    assert len(found.start) <= situation.room
    assert len({name for name, _ in found.start}) == len(found.start)
    for name, host in found.start:
        report = situation.prospects[name, host]
        assert by_id[name].standing is Standing.READY
        assert host in situation.destinations
        assert report.compatible
        assert situation.hosts.get(host, Failures()).until_s(30.0) <= NOW
        assert situation.pairs.get((name, host), Failures()).until_s(30.0) <= NOW
    for host in situation.destinations:
        sent = [by_id[name] for name, target in found.start if target == host]
        if sent:
            before = [one for one in situation.placed if one.destination == host]
            room = max(
                situation.prospects[one.id, host].room_bytes
                - sum(
                    p.memory_bytes for p in before if p.at_s >= situation.prospects[one.id, host].asked_at_s
                )
                for one in sent
            )
            assert sum(one.memory_bytes for one in sent) <= room
    for name in found.stays:
        assert by_id[name].standing is Standing.READY
        assert name not in {started for started, _ in found.start}
    assert found.wake_s >= NOW
    assert {by_id[name].standing for name, _ in found.ask} <= {Standing.READY}


@given(situations())
@settings(deadline=None, max_examples=300)
def test_no_place_is_left_empty_while_somebody_could_go(situation: Facts) -> None:
    """If fewer begin than there is room for, no other machine could have gone anywhere."""
    found = decide(situation)
    if len(found.start) >= situation.room or found.ask:
        return
    started = {name for name, _ in found.start}
    for one in situation.machines:
        if one.standing is not Standing.READY or one.id in started:
            continue
        for host in situation.destinations:
            report = situation.prospects.get((one.id, host))
            rests = max(
                situation.hosts.get(host, Failures()).until_s(30.0),
                situation.pairs.get((one.id, host), Failures()).until_s(30.0),
            )
            if report is None or not report.compatible or rests > NOW:
                continue
            sizes = {other.id: other.memory_bytes for other in situation.machines}
            promised = sum(
                p.memory_bytes
                for p in situation.placed
                if p.destination == host and p.at_s >= report.asked_at_s
            )
            promised += sum(sizes[name] for name, target in found.start if target == host)
            assert report.room_bytes - promised < one.memory_bytes


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0.1, 50)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.data(),
)
@settings(deadline=None, max_examples=100)
def test_a_drain_comes_to_its_end_whatever_fails_on_the_way(
    sizes: list[tuple[int, float]], room: int, data: st.DataObject
) -> None:
    """Played through with failures at random that stop one day: every machine gets away, each once."""
    left = [machine(f"m{number}", cost_s, gib) for number, (gib, cost_s) in enumerate(sizes)]
    pairs = dict[tuple[str, str], Failures]()
    hosts = dict[str, Failures]()
    now_s, moved, trouble = NOW, set[str](), 20
    for _ in range(400):
        if not left:
            break
        prospects = {
            (one.id, host): Prospect(compatible=True, room_bytes=10 * GIB, asked_at_s=now_s)
            for one in left
            for host in HOSTS
        }
        found = decide(Facts(left, HOSTS, prospects, now_s, room, 30.0, 15.0, pairs=pairs, hosts=hosts))
        assert found.start or found.wake_s > now_s
        for name, host in found.start:
            fails = trouble > 0 and data.draw(st.sampled_from(["", "NOT_CONVERGING", "PEER_UNREACHABLE"]))
            if not fails:
                assert name not in moved
                moved.add(name)
                left = [one for one in left if one.id != name]
                continue
            trouble -= 1
            if consequence(fails) is Consequence.HOST:
                hosts[host] = hosts.get(host, Failures()).again(now_s)
            pairs[name, host] = pairs.get((name, host), Failures()).again(now_s)
        now_s = max(now_s + 1.0, found.wake_s)
    assert left == []
