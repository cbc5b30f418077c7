"""The spans of a trace as the page draws them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

from vmferry.errors import InvalidArgumentError, TraceNotFoundError
from vmferry.telemetry.clocks import align, estimate_clocks
from vmferry.telemetry.spans import load_spans, span_tree
from vmferry.telemetry.timeline import tree_json


async def trace_document(trace_dir: Path, trace_id: str) -> web.Response:
    """The answer with the spans of a trace that this host has written."""
    if trace_dir == Path():
        raise web.HTTPNotFound(reason="This host writes no spans")
    try:
        spans = await asyncio.to_thread(load_spans, [trace_dir], trace_id)
    except TraceNotFoundError as error:
        raise web.HTTPNotFound(reason="No spans of this trace are here") from error
    except InvalidArgumentError as error:
        raise web.HTTPBadRequest(reason="This is no trace") from error
    spans = align(spans, estimate_clocks(spans))
    return web.json_response({"trace_id": spans[0].trace_id, "spans": tree_json(span_tree(spans))})
