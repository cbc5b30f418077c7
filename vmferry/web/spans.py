"""The spans of a trace as the page draws them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

from vmferry.errors import InvalidArgumentError, TraceNotFoundError
from vmferry.telemetry.clocks import align, estimate_clocks
from vmferry.telemetry.recording import write_spans
from vmferry.telemetry.spans import SpanRecord, load_spans, span_tree
from vmferry.telemetry.timeline import tree_json


async def trace_document(trace_dir: Path, trace_id: str) -> web.Response:
    """The answer with the spans of a trace that this host has written."""
    if trace_dir == Path():
        raise web.HTTPNotFound(reason="This host writes no spans")
    try:
        spans = await asyncio.to_thread(_ended_spans, trace_dir, trace_id)
    except TraceNotFoundError as error:
        raise web.HTTPNotFound(reason="No spans of this trace are here") from error
    except InvalidArgumentError as error:
        raise web.HTTPBadRequest(reason="This is no trace") from error
    spans = align(spans, estimate_clocks(spans))
    return web.json_response({"trace_id": spans[0].trace_id, "spans": tree_json(span_tree(spans))})


def _ended_spans(trace_dir: Path, trace_id: str) -> list[SpanRecord]:
    """A trace's spans, those that ended a moment ago too: the page is looked at right after a migration."""
    write_spans()
    return load_spans([trace_dir], trace_id)
