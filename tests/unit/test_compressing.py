"""A migration looks again and again at what its link carries, and at what compressing would do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from source_svc import compressing
from source_svc.compressing import Compression
from vmferry.rpc.connections import Carried, End
from vmferry.transfer.compression import METHODS, RAW, Effort, Method
from vmferry.transfer.traffic import Traffic

MIB = 1024 * 1024
ZSTD_1 = METHODS[2]


class Lanes:
    """A link of so many bytes per second, and a clock that goes by what it carries."""

    def __init__(self, bytes_per_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes_per_s = bytes_per_s
        self.now_s = 0.0
        self.traffic = Traffic()
        self.traffic.began(0.0)
        self.carried: dict[End, Carried] = {}
        """What the kernel says; nothing at first."""
        monkeypatch.setattr(compressing.time, "monotonic", lambda: self.now_s)

    def connections(self) -> dict[End, Carried]:
        return dict(self.carried)

    def carry(self, compression: Compression, ratio: float) -> Method:
        """One chunk, which waits for the link; returns how it was sent."""
        method = compression.next()
        sent = int(MIB / ratio) if method != RAW else MIB
        seconds = sent / self.bytes_per_s
        self.now_s += seconds
        self.traffic.acknowledged_bytes += sent
        encoded = 0 if method == RAW else sent
        effort = Effort(method, MIB, encoded, 0.4e-3, MIB / 600e6, MIB / 600e6)
        compression.add(effort, blocked_s=2 * seconds)
        return method


def opened(lanes: Lanes, *allowed: Method, link_bytes_per_s: float = 0.0) -> Compression:
    return Compression(
        allowed or METHODS,
        readers=2,
        traffic=lambda: lanes.traffic,
        link_bytes_per_s=link_bytes_per_s,
        connections=lanes.connections,
    )


def test_a_link_that_becomes_slow_and_quick_again_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw pages, then compressed ones within a few looks, then raw ones again."""
    lanes = Lanes(20e9, monkeypatch)
    compression = opened(lanes, link_bytes_per_s=20e9)
    quick = [lanes.carry(compression, 4.0) for _ in range(640)]
    assert quick.count(RAW) > 600
    lanes.bytes_per_s = 12e6
    slow = [lanes.carry(compression, 4.0) for _ in range(200)]
    assert slow.count(RAW) < 50
    assert slow[-1].encoding == "zstd"
    lanes.bytes_per_s = 20e9
    again = [lanes.carry(compression, 4.0) for _ in range(20_000)]
    assert again[-1000:].count(RAW) > 950


def test_now_and_then_a_raw_chunk_is_compressed_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents that begin to compress are noticed; where nothing may be compressed nothing is tried."""
    lanes = Lanes(12e6, monkeypatch)
    compression = opened(lanes)
    assert [lanes.carry(compression, 1.0) for _ in range(300)].count(RAW) > 200
    assert compression.current == RAW
    changed = [lanes.carry(compression, 4.0) for _ in range(300)]
    assert changed[-1].encoding == "zstd"
    only_raw = opened(lanes, RAW)
    assert {lanes.carry(only_raw, 4.0) for _ in range(300)} == {RAW}


def test_what_is_insisted_on_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents that do not compress, or a link that is quick, change nothing about the encoding."""
    lanes = Lanes(20e9, monkeypatch)
    compression = opened(lanes, METHODS[1])
    assert {lanes.carry(compression, 1.0) for _ in range(500)} == {METHODS[1]}


def flow(lanes: Lanes, peer: str, rate: float, seconds: float, *, both: bool = False) -> None:
    """Two connections to a host carry something for so long, one or the other or both at a time."""
    for name in ("lane 0", "lane 1"):
        end = End(name, peer)
        old = lanes.carried.get(end, Carried(0, 0.0))
        lanes.carried[end] = Carried(
            old.acked_bytes + int(rate * seconds / 2), old.carrying_s + seconds / (1 if both else 2)
        )


def chunk(lanes: Lanes, compression: Compression, seconds: float) -> Method:
    """One chunk whose making takes so long, and that crosses a fast link in no time."""
    method = compression.next()
    lanes.now_s += seconds
    lanes.traffic.acknowledged_bytes += MIB
    encode_s = 0.0 if method == RAW else seconds / 2
    compression.add(
        Effort(method, MIB, int(encode_s and MIB / 3), 0.4e-3, encode_s, 2 * encode_s), blocked_s=0.0
    )
    return method


def test_a_fast_link_is_known_from_the_first_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that compress leave it idle, which the kernel tells; then pages travel raw."""
    lanes = Lanes(1e9, monkeypatch)
    compression = opened(lanes)
    flow(lanes, "10.0.0.2", 2e9, 0.0)
    compression.start()
    assert compression.current == ZSTD_1
    for _ in range(40):
        flow(lanes, "10.0.0.2", 5e9, 0.001)
        chunk(lanes, compression, 0.01)
    assert compression.current == RAW


def test_connections_to_several_hosts_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them are the lanes is not known."""
    lanes = Lanes(1e9, monkeypatch)
    compression = opened(lanes)
    for _ in range(2):
        for peer in ("10.0.0.2", "10.0.0.3"):
            flow(lanes, peer, 5e9, 0.0)
        compression.start()
    for _ in range(40):
        for peer in ("10.0.0.2", "10.0.0.3"):
            flow(lanes, peer, 5e9, 0.001)
        chunk(lanes, compression, 0.01)
    assert compression.current != RAW


def test_a_full_link_is_reason_to_try_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that wait for it have the time to see whether compressing would pay after all."""
    lanes = Lanes(12e6, monkeypatch)
    compression = opened(lanes)
    flow(lanes, "10.0.0.2", 12e6, 0.0)
    compression.start()
    sent = []
    for _ in range(400):
        flow(lanes, "10.0.0.2", 12e6, MIB / 12e6, both=True)
        sent.append(lanes.carry(compression, 1.0))
    assert compression.current == RAW
    assert 30 < 200 - sent[200:].count(RAW) < 50


def test_several_threads_may_ask_and_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of what they tell is lost or counted twice, and a look is one thread's."""
    lanes = Lanes(1e9, monkeypatch)
    compression = opened(lanes)
    compression.start()
    looks: list[float] = []
    monkeypatch.setattr(compressing.Link, "add", lambda _self, passed, _share: looks.append(passed.blocked))

    def work(_: int) -> None:
        for _ in range(500):
            compression.add(Effort(compression.next(), MIB, 0, 0.0, 0.0, 0.0), blocked_s=1.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    lanes.now_s = 1000.0
    compression.add(Effort(RAW, MIB, 0, 0.0, 0.0, 0.0), blocked_s=0.0)
    assert looks == [pytest.approx(2000 / 1000 / 2)]
