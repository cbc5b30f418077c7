"""``vmferry probe``: what this host offers for guest memory: ways to track writes, and huge pages."""

from __future__ import annotations

import dataclasses

from vmferry.cli.machine import ConfigOption
from vmferry.cli.output import JsonOption, print_document, print_table
from vmferry.config import load_config
from vmferry.memory.probe import probe_huge_pages, probe_trackers


def probe(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Try every write tracker on this host, best first, and huge pages in its ram_dir, and say what was found."""
    ram_dir = load_config(config).ram_dir
    trackers, huge_pages = probe_trackers(), probe_huge_pages(ram_dir)
    if json:
        found = [dataclasses.asdict(finding) for finding in trackers]
        print_document({"trackers": found, "huge_pages": dataclasses.asdict(huge_pages)})
        return
    rows = [(finding.kind, _yes_or_no(finding.usable), finding.reason) for finding in trackers]
    print_table(("TRACKER", "USABLE", "FOUND"), rows, empty="no trackers")
    rows = [(huge_pages.folder, _yes_or_no(huge_pages.usable), huge_pages.reason)]
    print_table(("RAM_DIR", "HUGE PAGES", "FOUND"), rows, empty="no folder")


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
