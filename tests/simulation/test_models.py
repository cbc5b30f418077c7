"""The specification itself, in small bounds: what must hold holds, and what must break breaks, by both programs."""

from __future__ import annotations

import pytest

from models import spin, updates
from models.__main__ import check_broken, check_safe, check_spin
from models.variants import BROKEN, SAFE, Broken, Safe
from tests.support import require

pytestmark = pytest.mark.timeout(400)  # long where other work shares the machine


@pytest.mark.parametrize(
    "variant", [*SAFE, *updates.SAFE], ids=lambda variant: variant.what.replace(" ", "-")
)
def test_a_safe_variant_keeps_its_promises(variant: Safe) -> None:
    """Within the small bounds no world breaks a promise; ``make model`` searches the large ones."""
    found = check_safe(variant, quick=True)
    assert found.ok, f"{found.outcome}: {' -> '.join(found.trace)}"


@pytest.mark.parametrize(
    "variant", [*BROKEN, *updates.BROKEN], ids=lambda variant: variant.guard.replace(" ", "-")
)
def test_a_protocol_without_one_guard_breaks_its_promise(variant: Broken) -> None:
    """The guard is needed, and the search is not blind: there is a counter-example, of the promise it stands for."""
    found = check_broken(variant)
    assert found.ok
    assert found.outcome.startswith(variant.breaks)
    assert found.trace


@pytest.mark.parametrize(
    "name", [next(iter(spin.SAFE)), *spin.BROKEN[:3]], ids=lambda name: name.replace(" ", "-")
)
def test_another_program_agrees(name: str) -> None:
    """Spin finds no violation in a model of its own, and one in each that lacks a guard; ``make model`` runs all."""
    require(not spin.missing(), f"not installed: {', '.join(spin.missing())}")
    defines = spin.SAFE.get(name, (f"-D{name}",))
    found = check_spin(name, defines)
    assert found.ok, found.outcome
    assert bool(found.trace) == (name in spin.BROKEN)
