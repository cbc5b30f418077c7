"""Journals that the suites of the journal share."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmferry.handoff import journal
from vmferry.handoff.journal import Contents, Journal

LABEL: Final = b"vmferry source of the tests"


def payload(number: int) -> bytes:
    """A record of its own length and content."""
    return bytes((number + at) % 256 for at in range(40 + 97 * (number % 40)))


def filled(path: Path, count: int, *, start: int = 0, durable: bool = True) -> None:
    """Append ``count`` records."""
    log = Journal(path, LABEL)
    try:
        for number in range(start, start + count):
            log.append(payload(number), durable=durable)
    finally:
        log.close()


def read(data: bytes) -> Contents:
    """What a file of this content says."""
    return journal._contents(data, Path("source.journal"), LABEL)


def expected(count: int) -> tuple[bytes, ...]:
    """The first records."""
    return tuple(payload(number) for number in range(count))
