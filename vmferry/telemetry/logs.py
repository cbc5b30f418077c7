"""Logs: structured events on stderr that carry the trace they belong to.

Promise: one line of JSON per event, or coloured text when a person looks at it; every event names the service, the
host, the trace and span it happened in, and the migration it belongs to, if it belongs to one; records of the
standard library's logging come out the same way. Neither secrets nor guest memory get into the log: values of secret
keys, bytes and whole messages are replaced, and tracebacks show no local variables.

``get_logger`` works without ``configure``: events then are ordinary records of the standard library's logging.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any, Final

import structlog
from google.protobuf.message import Message
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

_SECRET_KEYS: Final = frozenset({"ticket", "transfer_token", "key_pem"})
_REDACTED: Final = "[redacted]"
_TO_STDLIB: Final[list[Processor]] = [
    structlog.stdlib.filter_by_level,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
]


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module; keyword arguments of its methods become fields of the event."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name), processors=_TO_STDLIB, wrapper_class=structlog.stdlib.BoundLogger
    )
    return logger


def bind_migration(migration_id: str) -> None:
    """Have every event from here on name this migration, in this task and in those it starts."""
    structlog.contextvars.bind_contextvars(migration=migration_id)


def within_migration(migration_id: str, trace_id: str = "") -> AbstractContextManager[None]:
    """Have every event within the block name this migration, and its trace where there is no span."""
    known = {"migration": migration_id} | ({"trace_id": trace_id} if trace_id else {})
    return structlog.contextvars.bound_contextvars(**known)


def configure(service: str, *, host: str, level: str) -> None:
    """Send the logs of this process to stderr; called once, by ``__main__``.

    Args:
        service: name of the service, as in its spans.
        host: name of the host, as in its spans.
        level: least severe level that is logged: debug, info, warning or error.
    """
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _Origin(service, host),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            redact,
            *_rendering(person=sys.stderr.isatty()),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    structlog.configure(  # for loggers made by structlog itself, which would print to stdout
        processors=_TO_STDLIB,
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


def set_level(level: str) -> None:
    """Log from this level on: debug, info, warning or error."""
    logging.getLogger().setLevel(level.upper())


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace what must not be written down: secrets by their keys, bytes and messages by what they are."""
    return {key: _harmless(key, value) for key, value in event.items()}


def _harmless(key: object, value: Any) -> Any:
    if key in _SECRET_KEYS:
        return _REDACTED
    if isinstance(value, dict):
        return {inner: _harmless(inner, item) for inner, item in value.items()}
    if isinstance(value, (list, tuple)) and key != "exc_info":
        return [_harmless(key, item) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"[{len(value)} bytes]"
    if isinstance(value, Message):
        return f"[{value.DESCRIPTOR.full_name}]"
    return value


class _Origin:
    """Adds where an event comes from: service, host, and the span it happened in."""

    def __init__(self, service: str, host: str) -> None:
        self._names = {"service": service, "host": host}

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        found: EventDict = {**event, **self._names}
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            found["trace_id"] = trace.format_trace_id(span.trace_id)
            found["span_id"] = trace.format_span_id(span.span_id)
        return found


def _rendering(*, person: bool) -> list[Processor]:
    if person:
        # The default would show local variables in tracebacks, and with them guest memory and tickets.
        return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
