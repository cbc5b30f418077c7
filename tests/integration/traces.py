"""The traces that services write, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def events(trace_dir: Path, trace_id: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every span event of a trace: span, event, attributes."""
    for path in trace_dir.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            for resource in json.loads(line)["resourceSpans"]:
                for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                    if span["traceId"] == trace_id:
                        for event in span.get("events", ()):
                            values = {item["key"]: item["value"] for item in event.get("attributes", ())}
                            yield span["name"], event["name"], values
