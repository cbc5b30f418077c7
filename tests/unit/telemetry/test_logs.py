"""Logs say where they come from, and never what must stay secret."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmferry.telemetry.logs import get_logger, redact
from vmferry.v1 import handoff_pb2

PREAMBLE = """
import logging
import structlog
from opentelemetry.sdk.trace import TracerProvider
from vmferry.telemetry import logs
from vmferry.v1 import handoff_pb2

logs.configure("source", host="host-a", level="info")
log = logs.get_logger("vmferry.test")
"""


def _environment() -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(Path.cwd()), "TERM": "xterm"}


def _logged(program: str) -> list[dict[str, Any]]:
    """What a process that runs ``program`` writes to stderr; it must write nothing to stdout."""
    command = [sys.executable, "-c", PREAMBLE + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=_environment(), check=True)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_event_is_a_line_of_json_with_its_origin() -> None:
    """An event names level, logger, service, host and time, and its fields."""
    (event,) = _logged('log.info("round sent", round=3, bytes=4096)')
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "round sent",
        "level": "info",
        "logger": "vmferry.test",
        "service": "source",
        "host": "host-a",
        "round": 3,
        "bytes": 4096,
    }


def test_event_in_a_span_names_trace_and_span() -> None:
    """An event that happens inside of a span carries its ids in hexadecimal."""
    (event,) = _logged("""
with TracerProvider(shutdown_on_exit=False).get_tracer("t").start_as_current_span("s") as span:
    context = span.get_span_context()
    log.warning("late", expected=f"{context.trace_id:032x} {context.span_id:016x}")
""")
    assert f"{event['trace_id']} {event['span_id']}" == event["expected"]


def test_other_loggers_come_out_the_same_way() -> None:
    """Records of the standard library and of structlog's own loggers are JSON on stderr too."""
    events = _logged("""
logging.getLogger("grpc").warning("odd %s", "thing", extra={"ticket": b"secret"})
structlog.get_logger("tls").error("unusable", path="x")
""")
    assert [(event["event"], event["level"], event["service"]) for event in events] == [
        ("odd thing", "warning", "source"),
        ("unusable", "error", "source"),
    ]
    assert events[0]["ticket"] == "[redacted]"


def test_level_is_obeyed() -> None:
    """What is less severe than the configured level is not logged."""
    assert [event["event"] for event in _logged('log.debug("no")\nlog.info("yes")')] == ["yes"]


def test_secrets_stay_out_of_the_log() -> None:
    """Tickets, tokens, keys, bytes and whole messages are replaced wherever they stand in an event."""
    (event,) = _logged("""
secret = "swordfish"
log.info(
    "begin", ticket=secret.encode(), transfer_token=secret, key_pem=secret, page=secret.encode() * 100,
    request=handoff_pb2.BeginRequest(ticket=secret.encode()),
    nested={"ticket": secret, "list": [secret.encode(), {"key_pem": secret}]},
)
""")
    assert "swordfish" not in json.dumps(event)
    assert event["page"] == "[900 bytes]"
    assert event["request"] == "[vmferry.v1.BeginRequest]"
    assert event["nested"] == {"ticket": "[redacted]", "list": ["[9 bytes]", {"key_pem": "[redacted]"}]}


FAILURE = """
def load(ticket):
    raise RuntimeError("did not load")
try:
    load("sword" + "fish")
except RuntimeError:
    log.exception("unexpected")
"""


def test_traceback_is_part_of_its_line() -> None:
    """An exception is one field of one line, with its traceback and without local variables."""
    (event,) = _logged(FAILURE)
    assert event["level"] == "error"
    assert "RuntimeError: did not load" in event["exception"]
    assert "swordfish" not in json.dumps(event)


def test_person_reads_text_without_local_variables() -> None:
    """On a terminal the log is coloured text; its tracebacks show no local variables either."""
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-c", PREAMBLE + 'log.info("hello", ticket="swordfish")' + FAILURE]
        subprocess.run(command, stderr=theirs, timeout=30, env=_environment(), check=True)
        os.set_blocking(ours, False)
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "hello" in shown
    assert "\x1b[" in shown
    assert "did not load" in shown
    assert "swordfish" not in shown


def test_logger_without_configuration_is_an_ordinary_logger(caplog: pytest.LogCaptureFixture) -> None:
    """A library user who never configures vmferry's logs gets records of the standard library, none on stdout."""
    get_logger("vmferry.test").warning("odd", lane=2)
    (record,) = caplog.records
    assert (record.name, record.levelname, record.msg) == (
        "vmferry.test",
        "WARNING",
        {"event": "odd", "lane": 2},
    )


def test_redaction_leaves_the_original_alone() -> None:
    """Redacting an event changes the event's copy only."""
    nested = {"ticket": b"x"}
    event = {"event": "e", "nested": nested, "message": handoff_pb2.GoRequest()}
    assert redact(None, "info", event)["nested"] == {"ticket": "[redacted]"}
    assert nested == {"ticket": b"x"}
