"""What all suites share."""

from __future__ import annotations

pytest_plugins = ("tests.integration.hosts",)
