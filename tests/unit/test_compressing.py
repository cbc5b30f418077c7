"""A migration looks again and again at what its link carries, and at what compressing would do."""

from __future__ import annotations

import pytest

from source_svc import compressing
from source_svc.compressing import Compression
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
        monkeypatch.setattr(compressing.time, "monotonic", lambda: self.now_s)

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
