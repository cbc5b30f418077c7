"""``vmferry probe``: which ways of tracking memory writes work on this host."""

from __future__ import annotations

import dataclasses

from vmferry.cli.output import JsonOption, print_document, print_table
from vmferry.memory.probe import probe_trackers


def probe(json: JsonOption = False) -> None:
    """Try every write tracker on this host, best first, and say what was found."""
    findings = probe_trackers()
    if json:
        print_document({"trackers": [dataclasses.asdict(finding) for finding in findings]})
        return
    rows = [(finding.kind, "yes" if finding.usable else "no", finding.reason) for finding in findings]
    print_table(("TRACKER", "USABLE", "FOUND"), rows, empty="no trackers")
