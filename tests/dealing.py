"""In which order several processes run the tests: what takes long comes first, and is dealt out evenly.

Promise: each process is given the modules that start services and machines before those that compute, whole, so that
a module's hosts are started once, and that at the end only small tests are left to take from one another.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Final

import pytest

_QUICK: Final = Path(__file__).resolve().parent / "unit"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    hands = getattr(config, "workerinput", {}).get("workercount", 1)
    if hands > 1:
        items[:] = dealt(items, hands)


def dealt(items: list[pytest.Item], hands: int) -> list[pytest.Item]:
    """The tests in equal parts, one for each process, as these are going to be split."""
    modules = [(path, list(tests)) for path, tests in groupby(items, key=lambda item: item.path)]
    long = [tests for path, tests in modules if not path.is_relative_to(_QUICK)]
    quick = [test for path, tests in modules if path.is_relative_to(_QUICK) for test in tests]
    result: list[pytest.Item] = []
    for hand in range(hands):
        part = [test for tests in long[hand::hands] for test in tests]
        free = max(0, (len(items) - len(result)) // (hands - hand) - len(part))
        result += part + quick[:free]
        del quick[:free]
    return result
