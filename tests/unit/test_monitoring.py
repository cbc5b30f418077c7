"""The dashboard and the alert rules in deploy/ speak of metrics that exist, and alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations

import pytest

from tests.support import require
from tests.unit.monitoring import DASHBOARD, ROOT, RULES, dashboard_expressions, rule_expressions
from vmferry.telemetry.instruments import INSTRUMENTS, Kind, label_name

RULE_TESTS = ROOT / "deploy/prometheus/vmferry.test.yaml"
NAME = re.compile(r"\bvmferry_\w+")
LABELS = {label_name(attribute) for one in INSTRUMENTS for attribute in one.attributes}
SERIES = {
    one.prometheus + ending
    for one in INSTRUMENTS
    for ending in (("_bucket", "_sum", "_count") if one.kind is Kind.HISTOGRAM else ("",))
}


@pytest.mark.parametrize("expressions", [dashboard_expressions, rule_expressions])
def test_every_metric_that_is_named_exists(expressions: object) -> None:
    """Neither file asks for a series that no service has; which ones those have is proved by a real scrape."""
    assert callable(expressions)
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(asked & SERIES) > 5
    assert asked - SERIES - LABELS == set()


def test_every_metric_is_on_the_dashboard() -> None:
    """Whoever looks at the dashboard sees all there is."""
    asked = {name for expression in dashboard_expressions() for name in NAME.findall(expression)}
    shown = {one.prometheus for one in INSTRUMENTS if any(name.startswith(one.prometheus) for name in asked)}
    assert {one.prometheus for one in INSTRUMENTS} - shown == set()


def test_panels_do_not_cover_each_other() -> None:
    """Each panel has its own id and place, a title, and takes its data from where the reader chose."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@pytest.mark.parametrize("command", [("check", "rules", str(RULES)), ("test", "rules", str(RULE_TESTS))])
def test_prometheus_agrees(command: tuple[str, ...]) -> None:
    """Prometheus's own tool reads the rules, and finds that alerts fire when they should and not otherwise."""
    require(shutil.which("promtool"), "promtool is not installed (apt install prometheus)")
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_the_handbook_says_what_to_do_about_each_alert() -> None:
    """docs/observability.md has a row for every alert, and for no other."""
    rules = re.findall(r"^ +- alert: (\w+)$", RULES.read_text(encoding="utf-8"), re.MULTILINE)
    text = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(Vmferry\w+)` \| (\w+) \|", text, re.MULTILINE)
    assert [name for name, _ in rows] == rules
    severities = re.findall(r"^ +severity: (\w+)$", RULES.read_text(encoding="utf-8"), re.MULTILINE)
    assert [severity for _, severity in rows] == severities
