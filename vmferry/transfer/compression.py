"""Which way of compressing a chunk pays: a pure policy over what was measured. No clock, no I/O.

Promise: the same measurements give the same choice. What does not pay by a clear margin is not done: a fast link, a
busy processor or contents that do not compress mean raw pages, within one look; a slow link means compression as
strong as the processor can keep up with. A choice is changed only for a gain that is worth a change.

For each method the rate at which page contents would arrive is the least of three: what the readers can make of it,
what the processor allows, and what the link carries of what is left of it. The best rate wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vmferry.negotiation.encodings import AUTO, LZ4, NONE, ZSTD


@dataclass(frozen=True)
class Method:
    """A way of making chunks smaller."""

    encoding: str
    level: int = 0
    """Of zstd; other encodings have none."""

    def __str__(self) -> str:
        return f"{self.encoding}-{self.level}" if self.level else self.encoding


RAW: Final = Method(NONE)
METHODS: Final = (RAW, Method(LZ4), Method(ZSTD, 1), Method(ZSTD, 3), Method(ZSTD, 6))
"""All there are, the quickest first."""


@dataclass(frozen=True)
class Effort:
    """What was done with one chunk."""

    method: Method
    data_bytes: int
    encoded_bytes: int
    """What the method made of it; 0 if it made nothing."""
    read_s: float
    """Seconds of a core for reading and hashing."""
    encode_s: float
    """Seconds of a core for the method."""
    encode_wall_s: float
    """How long that took."""


@dataclass(frozen=True)
class _Guess:
    """What a method does as long as nobody has seen it: bytes per second of a core, and share of zstd-1's gain."""

    bytes_per_s: float
    gain: float


_GUESSES: Final[Mapping[Method, _Guess]] = {
    METHODS[1]: _Guess(700e6, 0.6),
    METHODS[2]: _Guess(450e6, 1.0),
    METHODS[3]: _Guess(250e6, 1.2),
    METHODS[4]: _Guess(85e6, 1.3),
}
_GUESSED_LEFT: Final = 0.5
_FORGETTING: Final = 0.9
"""What an earlier chunk still counts when the next one has come."""
_CONTENTS_FORGETTING: Final = 0.92
"""The same for what contents compress to, which changes sooner than what a processor can do."""
_UNUSED_FORGETTING: Final = 0.95
"""What is known of a method still counts when a chunk was made with another one."""
_SURE_S: Final = 0.005
"""What a method takes by itself counts more than what others take, when it has worked for longer."""
_READ_AT_FIRST_BYTES: Final = 4 * 1024 * 1024
_READ_AT_FIRST_S: Final = 0.4e-9 * _READ_AT_FIRST_BYTES
"""How long reading and hashing take is known well enough to begin with as if so much had been read already."""
_LEAST_BYTES: Final = 64 * 1024
"""Chunks smaller than this say little."""


@dataclass
class _Mean:
    """What comes to one of something, over all chunks; of the earlier ones less and less counts."""

    forgetting: float = _FORGETTING
    amount: float = 0.0
    number: float = 0.0

    @property
    def value(self) -> float:
        """The mean; 0 if there was nothing."""
        return self.amount / self.number if self.number else 0.0

    def add(self, amount: float, number: float) -> None:
        """Note a chunk, which counts by its size."""
        self.forget(self.forgetting)
        self.amount += amount
        self.number += number

    def forget(self, left: float) -> None:
        """Let that part count of all that was noted so far."""
        self.amount *= left
        self.number *= left


@dataclass
class Experience:
    """What compressing has cost and gained so far, and what follows for methods that were not tried."""

    _read: _Mean = field(default_factory=lambda: _Mean(amount=_READ_AT_FIRST_S, number=_READ_AT_FIRST_BYTES))
    _left: _Mean = field(default_factory=lambda: _Mean(_CONTENTS_FORGETTING))
    """What zstd-1 leaves of a byte, by chunks of all methods: what is known of the contents; 0 if nothing is."""
    _pace: _Mean = field(default_factory=_Mean)
    """How many times as long as guessed the methods take: contents, and a busy processor, make all of them slower."""
    _seen: dict[Method, _Mean] = field(default_factory=dict)
    """The same of each method by itself."""
    _worked: _Mean = field(default_factory=_Mean)
    """Seconds of a core that compressing was given in a second."""

    @property
    def read_s_per_byte(self) -> float:
        """Seconds of a core to read and hash a byte."""
        return self._read.value

    @property
    def share(self) -> float:
        """What part of a core one gets who could use a whole one: the rest is used by others."""
        return min(1.0, self._worked.value) if self._worked.number else 1.0

    def add(self, effort: Effort) -> None:
        """Note what was done with a chunk."""
        if effort.data_bytes < _LEAST_BYTES:
            return
        self._read.add(effort.read_s, effort.data_bytes)
        if effort.encoded_bytes:
            self._note_pace(effort)
            gain = max(0.0, effort.data_bytes / effort.encoded_bytes - 1) / _GUESSES[effort.method].gain
            self._left.add(effort.data_bytes / (1 + gain), effort.data_bytes)
            # Only of this: reading and hashing also wait for Python's lock, which more processors would not help.
            self._worked.add(effort.encode_s, max(effort.encode_wall_s, 1e-9))

    def _note_pace(self, effort: Effort) -> None:
        guessed_s = effort.data_bytes / _GUESSES[effort.method].bytes_per_s
        self._pace.add(effort.encode_s, guessed_s)
        self._seen.setdefault(effort.method, _Mean()).add(effort.encode_s, guessed_s)
        for method, seen in self._seen.items():
            if method != effort.method:  # it may be different by now
                seen.forget(_UNUSED_FORGETTING)

    def ratio(self, method: Method) -> float:
        """How many times smaller a method makes these contents."""
        if method == RAW:
            return 1.0
        gain = 1 / (self._left.value or _GUESSED_LEFT) - 1
        return 1 + gain * _GUESSES[method].gain

    def encode_s_per_byte(self, method: Method) -> float:
        """Seconds of a core that a method takes for a byte."""
        if method == RAW:
            return 0.0
        pace = self._pace.value or 1.0
        if seen := self._seen.get(method):
            pace = (seen.amount + _SURE_S * pace) / (seen.number + _SURE_S)
        return pace / _GUESSES[method].bytes_per_s


_FIRST_GUESS_BYTES_PER_S: Final = 125e6
_GROWTH_PER_S: Final = 0.15
"""A link that is not filled may be faster than it was; believed so slowly that trying it out costs little."""
_BLOCKED: Final = 0.25
"""Share of their time that readers wait for lanes when these are what limits."""
_RISE_S: Final = 0.2
"""How long it takes to believe that a link is faster: what was acknowledged may have crossed it before."""
_FALL_S: Final = 0.15
"""How long it takes to believe that it is slower."""
_CONTENDED_FALL_S: Final = 1.0
"""The same where processors are scarce: then lanes may wait for them, and to compress more would make it worse."""
_CONTENDED: Final = 0.8
"""The share of a core that one gets of it, below which processors are scarce."""
_LEAST_BUSY_S: Final = 0.004
_LEAST_CARRIED_BYTES: Final = 512 * 1024
_CLOCK_S: Final = 0.008
"""Kernels measure in ticks of up to 4 ms, each lane for itself: a short burst may have taken so much longer."""
_FULL: Final = 0.8
"""The share of the time that connections carry something if nothing but the way limits."""
_BELIEF_S: Final = 0.05
"""How long connections have to have carried something until what the kernel says of it is believed."""
_CHANCE: Final = 1.4
"""By how much what it says of a tenth of a second may be too high or too low by chance."""
_CHANCE_BELIEF_S: Final = 0.2
"""How long it has to say something that could be by chance."""


@dataclass(frozen=True)
class Passed:
    """A stretch of time on the lanes."""

    seconds: float
    wire_bytes: float
    """What was acknowledged in it, as it was sent."""
    busy_s: float
    """How much of it something was on its way."""
    blocked: float
    """Share of it that readers waited for lanes to take a chunk."""
    carried_bytes: float = 0.0
    """What the other kernel acknowledged in it; 0 if that is not known."""
    carrying_s: float = 0.0
    """How much of it the connections carried something that the other kernel had room for."""


class Link:
    """How fast the lanes are, by what went over them while something was on its way.

    Kernels tell the way between the hosts from what is done at its ends. Where they do not say, it has to be guessed
    from what was acknowledged by the destination, which also waits for processors.
    """

    def __init__(self, bytes_per_s: float = 0.0) -> None:
        """Start with what a short measurement found, if there was one."""
        self._way = bytes_per_s or _FIRST_GUESS_BYTES_PER_S
        self._limit = math.inf
        """What lanes took when that was less than the way has room for: they, or the destination, are held back."""
        self.full = False
        """Whether the kernel said, when it was asked last, that nothing but the way limited."""

    @property
    def bytes_per_s(self) -> float:
        """What the lanes would take."""
        return min(self._way, self._limit)

    def add(self, passed: Passed, share: float) -> None:
        """Note a stretch of time.

        Args:
            passed: what happened in it.
            share: what part of a core one gets who could use a whole one.
        """
        told = passed.carried_bytes >= _LEAST_CARRIED_BYTES
        self.full = told and passed.blocked >= _BLOCKED and passed.carrying_s >= _FULL * passed.seconds
        if told:
            self._hear(passed)
            self._note_limit(passed, share)
        elif passed.busy_s >= _LEAST_BUSY_S:
            self._guess(passed, share)

    def _hear(self, passed: Passed) -> None:
        carrying_s = min(passed.seconds, passed.carrying_s + _CLOCK_S)
        rate = passed.carried_bytes / carrying_s
        is_news = max(rate, self._way) > _CHANCE * min(rate, self._way)
        self._way = _nearer(self._way, rate, carrying_s / (_BELIEF_S if is_news else _CHANCE_BELIEF_S))

    def _note_limit(self, passed: Passed, share: float) -> None:
        if passed.carrying_s >= _FULL * passed.seconds:
            self._limit = math.inf  # it is the way that limits
            return
        if passed.busy_s < _LEAST_BUSY_S:
            return
        rate = passed.wire_bytes / passed.busy_s
        if passed.blocked >= _BLOCKED:
            falling_s = _FALL_S if share >= _CONTENDED else _CONTENDED_FALL_S
            slower = rate < self.bytes_per_s
            self._limit = _nearer(self.bytes_per_s, rate, passed.seconds / (falling_s if slower else _RISE_S))
        elif self._limit < self._way:
            self._limit *= 1 + _GROWTH_PER_S * passed.wire_bytes / self.bytes_per_s
        else:
            self._limit = math.inf

    def _guess(self, passed: Passed, share: float) -> None:
        # While nothing is on its way, because pages are zero or not read yet, nothing is learnt about the link.
        rate = passed.wire_bytes / passed.busy_s
        if rate >= self._way:
            self._way = _nearer(self._way, rate, passed.seconds / _RISE_S)
        elif passed.blocked >= _BLOCKED:
            falling_s = _FALL_S if share >= _CONTENDED else _CONTENDED_FALL_S
            self._way = _nearer(self._way, rate, passed.seconds / falling_s)
        else:
            self._way *= 1 + _GROWTH_PER_S * passed.wire_bytes / self._way


def _nearer(believed: float, rate: float, times: float) -> float:
    return rate + (believed - rate) * math.exp(-times)


@dataclass(frozen=True)
class Situation:
    """What a choice depends on, besides the contents."""

    link_bytes_per_s: float
    readers: int
    """Chunks that are read and compressed at a time."""
    cores: float
    """Cores that the service gets if it wants them."""
    send_s_per_byte: float = 0.7e-9
    """Seconds of a core to send a byte, encryption and all."""
    handle_s_per_byte: float = 0.0
    """Seconds of a core for all else that is done for a byte of page contents, whatever it is made of."""


def methods(agreed: Iterable[str], wish: str = AUTO) -> tuple[Method, ...]:
    """The methods that both hosts know and the caller wants; never none."""
    wanted = set(agreed) if wish in ("", AUTO) else {wish} & set(agreed)
    return tuple(method for method in METHODS if method.encoding in wanted) or (RAW,)


def rate(method: Method, experience: Experience, situation: Situation, *, doubt_s: float = 0.0) -> float:
    """Bytes of page contents per second that would arrive.

    Args:
        method: how they are sent.
        experience: what is known of it, and of the contents.
        situation: link and processors.
        doubt_s: how much more of a core a byte may take than it seems.
    """
    make_s = experience.read_s_per_byte + experience.encode_s_per_byte(method)
    return min(
        situation.readers / make_s,
        max(situation.cores, 0.1) / (_work_s(method, experience, situation) + doubt_s),
        situation.link_bytes_per_s * experience.ratio(method),
    )


def _work_s(method: Method, experience: Experience, situation: Situation) -> float:
    """Seconds of a core for all that is done for a byte of page contents."""
    make_s = experience.read_s_per_byte + experience.encode_s_per_byte(method)
    return make_s + situation.handle_s_per_byte + situation.send_s_per_byte / experience.ratio(method)


_WORTH_COMPRESSING: Final = 1.2
_WORTH_MORE: Final = 1.03
_WORTH_A_CHANGE: Final = 1.04
_MUCH_MORE: Final = 1.2
"""What puts so many times as much on the link as the present method has to be worth it."""
_WORTH_SENDING_MORE: Final = 1.1
_FAR_BETTER: Final = 1.5
"""What even a short look cannot be wrong about."""
_MOST_AT_FIRST: Final = METHODS.index(Method(ZSTD, 1))
_AS_CHEAP: Final = 1.05
"""What takes no more of the processor than this times the least counts as sparing it as much."""
_DOUBT: Final = 0.2
"""What takes more of the processor than the present method may take so much more of it than it seems."""


def choose(
    allowed: Sequence[Method], experience: Experience, situation: Situation, current: Method
) -> Method:
    """The method for what comes next.

    Of those that are about as good as the best, the ones that spare the processor most, and of these the one that
    spares the link most; raw pages unless compressing is clearly better. One that takes more of the processor than
    the present one has to be better also if that is more than it seems.
    """
    work_s = {method: _work_s(method, experience, situation) for method in {*allowed, current}}
    rates = {
        method: rate(
            method, experience, situation, doubt_s=max(0.0, work_s[method] - work_s[current]) * _DOUBT
        )
        for method in allowed
    }
    best = max(rates.values())
    if rates.get(RAW, 0.0) * _WORTH_COMPRESSING >= best:
        return RAW
    good = [method for method in allowed if rates[method] * _WORTH_MORE >= best]
    least_s = min(work_s[method] for method in good)
    chosen = [method for method in good if work_s[method] <= least_s * _AS_CHEAP][-1]
    # What spares the processor nothing has to show for a change, and what fills the link with much more has to.
    worth = _WORTH_A_CHANGE if work_s[chosen] >= work_s[current] else 1.0
    if experience.ratio(chosen) * _MUCH_MORE < experience.ratio(current):
        worth = _WORTH_SENDING_MORE
    if current in rates and rates[chosen] < rates[current] * worth:
        return current
    return chosen


def first(allowed: Sequence[Method], experience: Experience, situation: Situation) -> Method:
    """The method to begin with, before anything was seen: one that costs little where it turns out to be wrong."""
    cautious = _cautious(allowed)
    return choose(cautious, experience, situation, cautious[-1])


def after_first_look(
    allowed: Sequence[Method], experience: Experience, situation: Situation, current: Method
) -> Method:
    """The method after a short first look, which can be far wrong about the link and what a byte takes.

    It changes only to raw pages, where these are about as good, or to what is far better.
    """
    chosen = choose(_cautious(allowed), experience, situation, current)
    if chosen == RAW or rate(chosen, experience, situation) >= _FAR_BETTER * rate(
        current, experience, situation
    ):
        return chosen
    return current


def _cautious(allowed: Sequence[Method]) -> Sequence[Method]:
    return [method for method in allowed if METHODS.index(method) <= _MOST_AT_FIRST] or allowed[:1]


def expected_rate(allowed: Sequence[Method], experience: Experience, situation: Situation) -> float:
    """Bytes of page contents per second to be expected, where raw pages were measured to go at the link's rate."""
    method = choose(allowed, experience, situation, allowed[0])
    return situation.link_bytes_per_s if method == RAW else rate(method, experience, situation)
