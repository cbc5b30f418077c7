"""What the dashboard and the alert rules in deploy/ ask for."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy/grafana/vmferry.json"
RULES = ROOT / "deploy/prometheus/vmferry.rules.yaml"


def dashboard_expressions() -> list[str]:
    """What the panels ask for."""
    document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in document["panels"] for target in panel["targets"]]


def rule_expressions() -> list[str]:
    """What the alerts look at, each on one line."""
    text = RULES.read_text(encoding="utf-8")
    found = re.findall(r"^ +expr: (?:\|\n((?: {10}.*\n)+)|(.*)\n)", text, re.MULTILINE)
    return [" ".join((block or line).split()) for block, line in found]
