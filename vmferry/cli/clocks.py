"""What became of a guest's clock, for programs and for people."""

from __future__ import annotations

from typing import Any

from vmferry.v1.clock_pb2 import ClockReport


def clock_document(clock: ClockReport) -> dict[str, Any]:
    """The fields of a document that tell it."""
    return {
        "clock_offset_before_ms": clock.offset_before_us / 1000,
        "clock_offset_after_ms": clock.offset_after_us / 1000,
        "clock_uncertainty_ms": clock.uncertainty_us / 1000,
        "clock_method": clock.method,
        "clock_measured": clock.measured,
        "clock_note": clock.note,
    }


def clock_words(clock: ClockReport) -> str:
    """The end of a sentence about a guest; empty if nothing is known of its clock."""
    if not clock.method:
        return ""
    before, after = clock.offset_before_us / 1000, clock.offset_after_us / 1000
    sure = "" if clock.measured else ", not measured"
    return f"clock {before:+.1f} ms off, then {after:+.1f} ms ({clock.method}{sure})"
