"""The clocks of several hosts are compared by the calls between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.telemetry.clocks import Clock, align, estimate_clocks
from vmferry.telemetry.spans import SpanRecord


def span(name: str, host: str, start: int, end: int, parent: str = "", *, failed: bool = False) -> SpanRecord:
    """A span whose id says where and when it began."""
    return SpanRecord("t", f"{host}-{name}-{start}", parent, name, "s", host, start, end, failed)


def call(
    name: str, there: str, start: int, ways: tuple[int, int, int], ahead: int, here: str = "a", own: int = 0
) -> list[SpanRecord]:
    """A call that takes so long there, to work and back; ``ahead`` and ``own`` are what the clocks are wrong by."""
    to, work, back = ways
    client = span(name, here, start + own, start + own + to + work + back)
    server = span(name, there, start + to + ahead, start + to + work + ahead, client.span_id)
    return [client, server]


_WAYS = st.tuples(st.integers(0, 10**6), st.integers(0, 10**7), st.integers(0, 10**6))


@given(st.integers(-(10**12), 10**12), st.lists(_WAYS, min_size=1, max_size=8))
def test_the_true_offset_is_within_the_error(ahead: int, calls: list[tuple[int, int, int]]) -> None:
    """However unevenly the way there and back are, the truth is no further off than the error says."""
    spans = [span("migrate", "a", 0, 10**9)]
    for number, ways in enumerate(calls):
        spans += call(f"call {number}", "b", number * 10**8, ways, ahead)
    clocks = estimate_clocks(spans)
    assert clocks["a"] == Clock("a", "a", 0, 0, 0)
    assert abs(clocks["b"].offset_ns - ahead) <= clocks["b"].error_ns + 1
    assert clocks["b"].calls == len(calls)
    shortest = min(to + back for to, _, back in calls)
    assert clocks["b"].error_ns <= shortest // 2 + 1


def test_aligned_spans_lie_within_their_calls() -> None:
    """After the shift every server's span is inside its client's again, whatever its clock said."""
    spans = [span("migrate", "a", 0, 10**9)]
    for number, ways in enumerate([(100, 1000, 300), (250, 50, 80)]):
        spans += call(f"call {number}", "b", number * 10**6, ways, ahead=-5 * 10**9)
    found = {one.span_id: one for one in align(spans, estimate_clocks(spans))}
    inside = [one for one in found.values() if one.parent_id]
    assert len(inside) == 2
    for one in inside:
        client = found[one.parent_id]
        assert client.start_ns <= one.start_ns
        assert one.end_ns <= client.end_ns


def test_clocks_are_compared_across_hosts_between() -> None:
    """A host that only the scheduler and the source speak of is compared over them, with the errors added up."""
    spans = [span("migrate", "a", 0, 10**9)]
    spans += call("StartMigration", "a", 5, (10, 10, 10), ahead=0, here="scheduler", own=700)
    spans += call("Begin", "b", 50, (20, 10, 20), ahead=900)
    clocks = estimate_clocks(spans)
    assert abs(clocks["scheduler"].offset_ns - 700) <= clocks["scheduler"].error_ns == 10
    assert abs(clocks["b"].offset_ns - 900) <= clocks["b"].error_ns == 20


def test_calls_that_mislead_count_for_nothing() -> None:
    """One whose client gave up before its server, one that failed, and spans that only lie in another's."""
    spans = [span("migrate", "a", 0, 10**9)]
    spans += call("good", "b", 0, (100, 50, 100), ahead=1000)
    gone = span("Transfer", "a", 0, 10)
    spans += [gone, span("Transfer", "b", 2000, 5000, gone.span_id)]
    broken = span("broken", "a", 0, 10**6, failed=True)
    spans += [broken, span("broken", "b", 5, 6, broken.span_id)]
    other = span("phase", "a", 0, 10**6)
    spans += [other, span("load", "b", 0, 1, other.span_id)]
    clock = estimate_clocks(spans)["b"]
    assert (clock.offset_ns, clock.error_ns, clock.calls) == (1000, 100, 1)


def test_a_host_that_no_call_connects_has_no_offset() -> None:
    """Nothing is guessed, and its spans stay where they are."""
    spans = [span("migrate", "a", 0, 100), span("receive", "b", 7, 9)]
    clocks = estimate_clocks(spans)
    assert set(clocks) == {"a"}
    assert align(spans, clocks) == spans
    assert estimate_clocks([]) == {}


@pytest.mark.parametrize(
    ("offset", "word"), [(12_345_678, "12.346 ms ahead of"), (-1_000, "0.001 ms behind")]
)
def test_it_is_said(offset: int, word: str) -> None:
    """A sentence names both hosts, the direction, the error and what it rests on."""
    said = Clock("b", "a", offset, 400_000, 7).sentence()
    for part in ("clock of b", word, "that of a", "\N{PLUS-MINUS SIGN} 0.400 ms", "7 calls"):
        assert part in said
