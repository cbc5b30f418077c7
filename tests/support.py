"""Small things that several suites need."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the calling test unless ``condition`` holds; fail instead where everything is required (CI)."""
    if condition:
        return
    if os.environ.get("VMFERRY_REQUIRE") == "all":
        pytest.fail(f"required here, but missing: {reason}")
    pytest.skip(reason)


def wait_until(
    condition: Callable[[], object], *, seconds: float = 10.0, what: str = "the condition"
) -> None:
    """Poll ``condition`` until it holds; fail naming ``what`` when ``seconds`` are over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {seconds:g} s")
        time.sleep(0.005)
