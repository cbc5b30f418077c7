"""A hypervisor's own stream as both ends see it: its digest, and its rounds for the convergence policy. Pure.

Promise: two digests have the same root only if both ends saw the same bytes in the same order; a round's figures
never look better than what the hypervisor said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_128

from vmferry.transfer.convergence import RoundReport
from vmferry.transfer.wire import Buffer

MAX_PIECE_BYTES: Final = 2 * 1024 * 1024
"""The most that one frame carries of a stream."""


class StreamDigest:
    """A digest over all bytes of a stream and over how many they are."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._hash = xxh3_128()

    def update(self, data: Buffer) -> None:
        """Note what comes next."""
        self._hash.update(data)
        self.size_bytes += len(data)

    def root(self) -> bytes:
        """What stands for the memory in the seal."""
        return self._hash.digest() + self.size_bytes.to_bytes(8, "big")


@dataclass(frozen=True)
class Sample:
    """What a hypervisor said about its stream at one moment."""

    at_s: float
    rounds: int
    """How often it has collected what the guest wrote."""
    transferred_bytes: int
    remaining_bytes: int


class Rounds:
    """Tells the hypervisor's rounds apart, from samples that are taken now and then."""

    def __init__(self, sent_bytes: Callable[[], int], first: Sample) -> None:
        self.number = 1
        self._sent_bytes = sent_bytes
        self._last = first
        self._began = first
        self._sent_before = sent_bytes()

    def add(self, sample: Sample) -> RoundReport | None:
        """The round that has ended since the sample before, if one has; several short ones count as one."""
        before, self._last = self._last, sample
        if sample.rounds <= before.rounds:
            return None
        # Of what was sent since, the remainder of the old round went first; the rest belonged to the new one.
        sent_of_new = max(0, sample.transferred_bytes - before.transferred_bytes - before.remaining_bytes)
        sent = self._sent_bytes()
        report = RoundReport(
            self.number,
            sample.at_s - self._began.at_s,
            sent - self._sent_before,
            sample.remaining_bytes + sent_of_new,
        )
        self.number += 1
        self._began, self._sent_before = sample, sent
        return report
