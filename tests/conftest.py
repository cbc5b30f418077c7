"""What all suites share."""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = ("tests.dealing", "tests.ending", "tests.integration.hosts")

# How long an example takes says how busy this computer is, and nothing about what is promised.
settings.register_profile("vmferry", deadline=None, print_blob=True)
settings.load_profile("vmferry")
