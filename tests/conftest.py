"""What all suites share."""

from __future__ import annotations

import pytest
from hypothesis import settings

# What helpers assert tells its values, too; before any of them is imported.
pytest.register_assert_rewrite(
    "tests.hostile", "tests.integration", "tests.simulation", "tests.support", "tests.unit"
)

pytest_plugins = ("tests.dealing", "tests.ending", "tests.integration.hosts")

# How long an example takes says how busy this computer is, and nothing about what is promised.
settings.register_profile("vmferry", deadline=None, print_blob=True)
settings.load_profile("vmferry")
