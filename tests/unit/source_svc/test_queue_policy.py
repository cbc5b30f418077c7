"""Who begins when: every rule of the queue's policy, as a table of facts and what follows from them."""

from __future__ import annotations

import pytest

from source_svc.queue_policy import Facts, Full, Patience, Running, Waiting, decide, in_order, sooner, without


def waiting(*texts: str) -> list[Waiting]:
    """Migrations in order of arrival, each as ``caller>destination`` with ``!priority`` if it has one."""
    found = []
    for number, text in enumerate(texts, 1):
        who, _, priority = text.partition("!")
        caller, _, destination = who.partition(">")
        found.append(Waiting(f"{number}", caller, destination, number, int(priority or 0)))
    return found


def order(facts: Facts) -> str:
    """The ids in order."""
    return " ".join(one.id for one in in_order(facts))


@pytest.mark.parametrize(
    ("queue", "running", "served", "expected"),
    [
        ([], [], {}, ""),
        (["x>b", "x>b", "x>b"], [], {}, "1 2 3"),  # first come, first served
        (["x>b", "x>b!5", "x>b!9"], [], {}, "3 2 1"),  # a higher priority comes first
        (["x>b", "x>b", "y>b"], [], {}, "1 3 2"),  # callers take turns
        (["x>b", "x>b", "y>b", "z>b"], [], {}, "1 3 4 2"),
        (["x>b", "y>b"], ["x>c"], {}, "2 1"),  # who has something under way already waits for the other
        (["x>b", "y>b"], [], {"x": 2, "y": 1}, "2 1"),  # who was served longest ago comes first
        (["x>b", "y>b"], [], {"x": 2}, "2 1"),  # or never
        (["x>b", "x>b", "x>c"], [], {}, "1 3 2"),  # destinations of one caller take turns
        (["x>b", "x>c"], ["y>b"], {}, "2 1"),
        (["x>b", "x>b!1", "y>b"], [], {}, "2 3 1"),  # what is first in another class counts as well
    ],
)
def test_the_order(queue: list[str], running: list[str], served: dict[str, int], expected: str) -> None:
    """Priority, then turns of callers, then turns of destinations, then arrival."""
    under_way = [Running(one.caller, one.destination) for one in waiting(*running)]
    assert order(Facts(waiting(*queue), under_way, 2, 0.0, served=served)) == expected


@pytest.mark.parametrize("places", [1, 2, 3, 9])
def test_as_many_begin_as_there_is_room_for(places: int) -> None:
    """No fewer, and no more; the others know their place and what they wait for."""
    plan = decide(Facts(waiting("x>b", "x>b", "x>b"), [], places, 0.0))
    assert len(plan.start) == min(places, 3)
    assert [place.position for place in plan.places.values()] == list(range(1, 4 - len(plan.start)))
    assert all("max_outgoing" in place.waits_for for place in plan.places.values())
    assert plan.wake_s is None  # only the end of one makes room


def test_what_runs_takes_room() -> None:
    """Migrations under way count, also those to other hosts."""
    plan = decide(Facts(waiting("x>b"), [Running("y", "c"), Running("y", "c")], 2, 0.0))
    assert (list(plan.start), plan.places["1"].position) == ([], 1)


def test_nobody_waits_behind_a_full_destination() -> None:
    """Who goes elsewhere begins; who waits for the full one says so, and when it is asked again."""
    full = {"b": Full(tries=3, until_s=7.0)}
    plan = decide(Facts(waiting("x>b!9", "x>c"), [], 1, 5.0, full))
    assert list(plan.start) == ["2"]
    assert plan.places["1"].next_try_s == 7.0
    assert "b has no room" in plan.places["1"].waits_for


def test_a_full_destination_is_asked_again_in_time() -> None:
    """While there is room here, the wait ends when the first of the destinations may be asked."""
    full = {"b": Full(1, 7.0), "c": Full(1, 6.0)}
    facts = Facts(waiting("x>b", "x>c"), [], 2, 5.0, full)
    assert decide(facts).wake_s == 6.0
    later = decide(Facts(facts.waiting, [], 2, 6.0, full))
    assert (list(later.start), later.wake_s) == (["2"], 7.0)


def test_one_asks_a_full_destination_for_all() -> None:
    """Until that one is answered the others wait; once it is taken in, all may go."""
    full = {"b": Full(1, 0.0)}
    queue = waiting("x>b", "x>b", "x>b")
    assert list(decide(Facts(queue, [], 9, 1.0, full)).start) == ["1"]
    asking = decide(Facts(queue[1:], [Running("x", "b", asking=True)], 9, 1.0, full))
    assert (list(asking.start), asking.wake_s) == ([], None)
    taken = decide(Facts(queue[1:], [Running("x", "b")], 9, 1.0, without(full, "b")))
    assert list(taken.start) == ["2", "3"]


def test_patience_doubles_up_to_its_limit() -> None:
    """Each answer without room doubles the wait; the share spreads hosts that wait for the same one."""
    patience, known, waits = Patience(1.0, 5.0), None, []
    for _ in range(40):
        known = patience.after(known, 100.0)
        waits.append(known.until_s - 100.0)
    assert waits == [1.0, 2.0, 4.0, *[5.0] * 37]
    assert patience.after(None, 0.0, share=0.5).until_s == 0.5


def test_an_end_makes_a_destination_worth_asking() -> None:
    """When a migration to a full host ends, it may be asked at once; what it had said is not forgotten."""
    full = {"b": Full(4, 50.0)}
    assert sooner(full, "b", 10.0) == {"b": Full(4, 10.0)}
    assert sooner(full, "c", 10.0) == full


def test_everybody_gets_a_turn() -> None:
    """One caller with a hundred cannot keep another from being served next but one, again and again."""
    queue = waiting(*["x>b"] * 100, *["y>b"] * 3)
    served: dict[str, int] = {}
    begun = []
    while queue and len(begun) < 8:
        (first,) = decide(Facts(queue, [], 1, 0.0, served=served)).start
        one = next(one for one in queue if one.id == first)
        queue.remove(one)
        served[one.caller] = len(begun)
        begun.append(one.caller)
    assert begun == ["x", "y", "x", "y", "x", "y", "x", "x"]


def test_a_long_queue_is_decided_quickly() -> None:
    """A thousand that wait cost no more than what a table of callers and destinations costs."""
    queue = waiting(*[f"{number % 7}>{number % 11}" for number in range(1000)])
    facts = Facts(queue, [], 2, 0.0)
    plan = decide(facts)
    assert (len(plan.start), len(plan.places)) == (2, 998)
    assert sorted(place.position for place in plan.places.values()) == list(range(1, 999))
