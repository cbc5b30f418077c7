"""What a drain says of itself: what is being done, what comes next, and when something is tried again."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.drain.situations import NOW, facts, machine, prospect
from vmferry.drain.activity import asking, measuring, turns, what_next
from vmferry.drain.planner import Facts, Failures, Placed, Standing, decide

NAMES = {name: name for name in ("one", "two", "three")}


def said(situation: Facts) -> str:
    return what_next(situation, decide(situation), NAMES)


def test_while_hosts_are_asked_and_costs_measured_it_says_so() -> None:
    """The first seconds of a drain move nothing: what goes on then, and what follows, is said."""
    assert asking([machine("one")], ["spiffe://t/vmhost/b", "spiffe://t/vmhost/c"]) == (
        "asking b, c about 1 machine; nothing moves before they have answered"
    )
    assert measuring(3, 10, 15.0).startswith("measuring what moving each machine costs, 3 of 10 done, 15 s")


def test_the_next_one_is_named_with_what_it_waits_for() -> None:
    """The cheapest that has not begun; it waits for one under way to end, or for room at a destination."""
    three = [machine("one", 1.0), machine("two", 2.0), machine("three", 3.0)]
    assert "three goes next, as soon as one of the 2 under way has ended" in said(facts(three))
    assert turns(decide(facts(three, room=0))) == ["one", "two", "three"]

    full = {(one.id, host): prospect(gib=1) for one in three for host in ("b", "c")}
    spoken = [Placed(host, 1 << 30, NOW, under_way=True) for host in ("b", "c")]
    waits = facts(three, prospects=full, placed=spoken)
    assert decide(waits).start == []
    passing = {pair: replace(known, passing=True) for pair, known in full.items()}
    assert said(replace(waits, prospects=passing)).startswith(
        "one goes next, as soon as a destination has room"
    )


def test_the_last_ones_are_counted() -> None:
    """When nothing waits any more."""
    assert said(facts([machine("one", standing=Standing.MOVING)])) == "nothing waits; 1 under way"


def test_what_rests_is_named_with_its_time_and_the_words_stay() -> None:
    """A host that failed, and a machine that came back; a second later the very same is said."""
    refused = {("one", host): prospect(compatible=False) for host in ("b", "c")}
    situation = replace(
        facts([machine("one")], prospects=refused, pairs={("one", "c"): Failures(2, NOW - 5)}),
        hosts={"b": Failures(1, NOW - 5)},
    )
    text = said(situation)

    assert "looking again every 15 s" in text
    assert "b does not answer as it should and is left alone until 13:47:05Z" in text
    assert "what came back is tried again at 13:48:05Z" in text
    assert said(replace(situation, now_s=NOW + 1)) == text
