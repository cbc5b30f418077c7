"""A compatibility report as a person reads it: by severity, each finding with its name, object, words and remedy.

Promise: nothing is left out or cut off, whatever the width; the lines can be searched for a finding's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vmferry.cli.output import harmless
from vmferry.cli.prediction import prediction_lines
from vmferry.v1 import compatibility_pb2
from vmferry.v1.compatibility_pb2 import CompatibilityItem, CompatibilityReport

_WORDS: Final = {
    compatibility_pb2.SEVERITY_BLOCKS: "blocks",
    compatibility_pb2.SEVERITY_WARNS: "warns",
    compatibility_pb2.SEVERITY_NOTE: "note",
}


def report_lines(report: CompatibilityReport) -> Iterator[str]:
    """The lines of a report, what is predicted before what was found."""
    groups: dict[str, list[CompatibilityItem]] = {word: [] for word in _WORDS.values()}
    for item in report.items:
        groups[_WORDS.get(item.severity, "note")].append(item)
    verdict = "could move" if report.compatible else "cannot move"
    counts = ", ".join(f"{len(items)} {word}" for word, items in groups.items() if items) or "no findings"
    chosen = f"protocol version {report.protocol_version}, tracker {report.tracker or 'none'}"
    yield f"{verdict}: {counts}; {chosen}"
    if report.path_reason:
        yield _line(f"path {report.path or 'none'}: {report.path_reason}")
    if report.HasField("prediction"):
        yield from prediction_lines(report.prediction)
    for word, items in groups.items():
        for item in items:
            yield ""
            yield from _lines(word, item)


def _lines(word: str, item: CompatibilityItem) -> Iterator[str]:
    yield _line(f"{word}  {item.id}  ({item.object})")
    yield _line(f"    {item.message}")
    if item.remedy:
        yield _line(f"    do: {item.remedy}")


def _line(text: str) -> str:
    """One line, whatever the other host wrote."""
    return harmless(text).replace("\n", " ")
