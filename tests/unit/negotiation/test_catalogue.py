"""What a plan may say is documented, all of it and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmferry.negotiation.findings import FINDINGS, Severity, finding

DOCS = Path(__file__).parents[3] / "docs" / "compatibility.md"
ROW = re.compile(r"^\| `([a-z.-]+)` \| ([a-z, ]+) \| ([^|]+) \|([^|]*)\|$", re.MULTILINE)


def test_the_table_in_the_documentation_is_the_catalogue() -> None:
    """One row for each finding with its severities, a meaning, and what to do unless it is a note; in order."""
    rows = ROW.findall(DOCS.read_text(encoding="utf-8"))
    known = {
        name: {severity.name.lower() for severity in severities} for name, severities in FINDINGS.items()
    }
    assert {name: set(words.split(", ")) for name, words, _, _ in rows} == known
    assert len(rows) == len(known)
    for name, words, meaning, remedy in rows:
        assert meaning.strip(), name
        assert remedy.strip() or words == "note", name


def test_names_are_in_order_and_of_one_form() -> None:
    """A name is an area and a fact in lower case, so that a program can group them."""
    assert list(FINDINGS) == sorted(FINDINGS)
    assert all(re.fullmatch(r"[a-z]+\.[a-z]+(-[a-z]+)*", name) for name in FINDINGS)
    assert all(severities == tuple(sorted(severities)) for severities in FINDINGS.values())


@pytest.mark.parametrize(
    ("name", "severity", "remedy"),
    [
        ("host.full", Severity.BLOCKS, "wait"),
        ("clock.source", None, "wait"),
        ("host.full", None, ""),
    ],
)
def test_a_finding_beside_the_catalogue_cannot_be_made(
    name: str, severity: Severity | None, remedy: str
) -> None:
    """Another severity, none where there is a choice, or no remedy for what hinders, is a bug that shows at once."""
    with pytest.raises(AssertionError):
        finding(name, "message", "object", remedy, severity=severity)
    with pytest.raises(KeyError):
        finding("host.unheard-of", "message", "object", "remedy")
