"""What the suites of the hand-off's journals share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many registers are opened, and none needs to survive a crash."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr("vmferry.handoff.ledger.time.sleep", lambda _: None)
