"""A hypervisor's stream has one digest at both ends, and its rounds are told apart from what it says now and then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmferry.transfer.streams import Rounds, Sample, StreamDigest

MIB = 1 << 20


@given(st.lists(st.binary(max_size=50)), st.binary(min_size=1, max_size=5))
def test_the_digest_is_of_the_bytes_and_not_of_the_pieces(pieces: list[bytes], more: bytes) -> None:
    """However a stream is cut it has the same digest, and a longer one has another."""
    cut, whole = StreamDigest(), StreamDigest()
    for piece in pieces:
        cut.update(piece)
    whole.update(b"".join(pieces))
    assert cut.root() == whole.root()
    assert cut.size_bytes == whole.size_bytes == sum(map(len, pieces))
    whole.update(more)
    assert cut.root() != whole.root()


def rounds(sent: list[int]) -> Rounds:
    return Rounds(lambda: sent[0], Sample(0.0, 1, 0, 100 * MIB))


def test_a_round_ends_when_the_hypervisor_collects_again() -> None:
    """Its report has the time since the last one, what went over the lanes, and all that is to be sent now."""
    sent = [0]
    told = rounds(sent)
    sent[0] = 60 * MIB
    assert told.add(Sample(1.0, 1, 60 * MIB, 40 * MIB)) is None
    sent[0] = 100 * MIB
    report = told.add(Sample(2.0, 2, 105 * MIB, 15 * MIB))
    assert report is not None
    # 45 MiB were sent since: the 40 that were left, and 5 of the 20 that were written meanwhile.
    assert (report.number, report.seconds, report.sent_bytes) == (1, 2.0, 100 * MIB)
    assert report.dirty_bytes == (15 + 5) * MIB
    assert told.number == 2


def test_short_rounds_between_two_samples_count_as_one() -> None:
    """Nothing is made up about what nobody saw."""
    told = rounds([0])
    report = told.add(Sample(0.5, 7, 200 * MIB, MIB))
    assert report is not None
    assert report.number == 1
    assert told.add(Sample(0.6, 7, 201 * MIB, 0)) is None
