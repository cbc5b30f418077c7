"""Why a machine cannot be updated in place: each reason from its fact, all of them at once, each in the book."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from vmferry.negotiation.about_update import (
    OBSTACLES,
    ROOM_BYTES,
    UpdateFacts,
    different_cpu,
    differing,
    obstacles,
)

DOCS: Final = Path(__file__).resolve().parents[3] / "docs/update.md"
FINE: Final = UpdateFacts(
    machine_type="pc-q35-7.2", machine_types=frozenset({"pc-q35-7.2"}), binary="/opt/qemu"
)
WRONG: Final[dict[str, dict[str, Any]]] = {
    "update.accelerator": {"accelerator_problem": "no kvm"},
    "update.changes-guest": {"changes": ["memory_mib"]},
    "update.device-not-saved": {"blockers": ["a device that cannot be migrated"]},
    "update.hypervisor-not-allowed": {"binary_allowed": False},
    "update.hypervisor-unusable": {"binary_problem": "missing"},
    "update.machine-busy": {"busy": "a migration is open"},
    "update.machine-not-owned": {"owned": False},
    "update.machine-not-running": {"running": False},
    "update.machine-type": {"machine_type": "pc-q35-2.4"},
    "update.memory-not-shared": {"shared_memory": False},
    "update.nic-not-shareable": {"taps": ["tap0"]},
    "update.no-memory": {"available_bytes": ROOM_BYTES - 1},
    "update.no-place": {"no_place": "the path is too long"},
}


def test_nothing_is_in_the_way_of_a_fine_machine() -> None:
    """Just enough of everything is enough."""
    assert obstacles(FINE) == []
    assert obstacles(UpdateFacts()) == []


@pytest.mark.parametrize("name", WRONG)
def test_each_fact_has_its_reason(name: str) -> None:
    """Exactly the one, and it says what to do, or what it is about."""
    (found,) = obstacles(replace(FINE, **WRONG[name]))
    assert found.id == name
    assert found.message
    assert found.remedy or found.object


def test_all_reasons_are_told_at_once() -> None:
    """Not just the first; a device in another process is one more."""
    everything = {key: value for facts in WRONG.values() for key, value in facts.items()}
    found = obstacles(replace(FINE, **everything, foreign_backends=["net0 (vhost-user)"]))
    assert {one.id for one in found} == set(WRONG)
    assert [one.object for one in found if one.id == "update.device-not-saved"] == [
        "device",
        "net0 (vhost-user)",
    ]


def test_descriptions_are_compared_field_by_field() -> None:
    """What no guest can see may differ; everything else is named, however deep, present or not."""
    old = {"version": 1, "memory_mib": 16, "qemu": {"binary": "/a", "cpu": "x", "disks": [1]}, "gone": 1}
    new = {"version": 2, "memory_mib": 16, "qemu": {"binary": "/b", "cpu": "y", "disks": [2]}, "come": 1}
    assert differing(old, old) == []
    assert differing(old, new) == ["come", "gone", "qemu.cpu", "qemu.disks"]
    assert differing({"kind": {}}, {"kind": 1}) == ["kind"]


def test_a_processor_that_lacks_something_is_seen() -> None:
    """By leaf; more of it, and what is not known, is not held against it, and what is absent is 0."""
    one = {(1, 0, "ecx"): 5, (7, 0, "ebx"): 0}
    assert different_cpu(one, {(1, 0, "ecx"): 5}) == []
    assert different_cpu(None, one) == different_cpu(one, None) == []
    assert different_cpu(one, {(1, 0, "ecx"): 7, (2, 0, "ecx"): 1}) == []
    assert [found.id for found in different_cpu(one, {})] == ["update.cpu"]
    (found,) = different_cpu(one, {(1, 0, "ecx"): 4})
    assert (found.id, "0x1" in found.message) == ("update.cpu", True)


def test_every_reason_is_in_the_book() -> None:
    """docs/update.md has a row for each, and no other."""
    rows = re.findall(r"^\| `(update\.[a-z-]+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(OBSTACLES)
    assert set(WRONG) | {"update.cpu"} == set(OBSTACLES)
