"""Which tracker is chosen, and that findings never lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.errors import TrackerUnavailableError
from vmferry.memory import probe
from vmferry.memory.digest import PageTable
from vmferry.memory.probe import TrackerFinding, choose_tracker, probe_trackers
from vmferry.memory.runs import PageRuns
from vmferry.memory.trackers import HashTracker


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_probing_names_every_tracker_and_leaves_nothing() -> None:
    """Each tracker has a finding with a reason, best first; hash always works; no descriptor is left."""
    before = open_descriptors()
    findings = {finding.kind: finding for finding in probe_trackers()}
    assert open_descriptors() == before
    assert list(findings) == ["pagemap-scan", "soft-dirty", "hash"]
    assert all(finding.reason for finding in findings.values())
    assert findings["hash"].usable


def test_a_tracker_that_misses_the_write_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature that pretends to work (as clear_refs does without its bit) is found out."""

    class Blind(HashTracker):
        def scan(self) -> PageRuns:
            return PageRuns()

    monkeypatch.setitem(probe._TRACKERS, "hash", lambda _mapped, ram, sent: Blind(ram, sent))
    finding = probe_trackers()[-1]
    assert not finding.usable
    assert "told of 0 pages after one was written" in finding.reason


def test_the_best_usable_tracker_is_chosen_and_never_another_than_insisted_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Best first; an unusable or unknown one that was insisted on is refused with all findings."""
    found = [
        TrackerFinding("pagemap-scan", usable=False, reason="ENOTTY"),
        TrackerFinding("soft-dirty", usable=True, reason="works"),
        TrackerFinding("hash", usable=True, reason="works"),
    ]
    monkeypatch.setattr(probe, "probe_trackers", lambda: found)
    with probe._subject() as (mapped, ram, _):
        sent = PageTable(ram.page_count)
        assert choose_tracker(mapped, ram, sent).kind == "soft-dirty"
        assert choose_tracker(mapped, ram, sent, "hash").kind == "hash"
        for insist in ("pagemap-scan", "no-such"):
            with pytest.raises(TrackerUnavailableError, match="not usable, ENOTTY; soft-dirty: usable"):
                choose_tracker(mapped, ram, sent, insist)
