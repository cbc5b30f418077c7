"""Both ends of the bare transport, each a process of its own as the services are.

``python -m vmferry.bench.pump sink ...`` has the receiving lanes of a destination, which forget what they take in; it
says its port, and serves until its input ends. ``... source ...`` has the sending lanes of a migration, and pumps
pages over them that it made beforehand. Everything between the two is what a migration has: frames are encoded,
numbered, encrypted, decoded, acknowledged, over mutual TLS. Nobody reads a guest or writes one.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

from vmferry.rpc.allocator import keep_buffers, share_one_heap
from vmferry.security.tls13 import enforce_tls13

# Before anything loads grpc.
enforce_tls13()
share_one_heap()

import grpc.aio  # noqa: E402 - see above
from xxhash import xxh3_128_digest  # noqa: E402

from vmferry.bench.contents import contents  # noqa: E402
from vmferry.memory.runs import PAGE_SIZE  # noqa: E402
from vmferry.rpc.daemon import SWITCH_INTERVAL_S  # noqa: E402
from vmferry.rpc.handlers import read_requests_with  # noqa: E402
from vmferry.security.identity import Identity  # noqa: E402
from vmferry.security.tls import SERVER_OPTIONS, TlsFiles, open_lane_channel, server_credentials  # noqa: E402
from vmferry.transfer.compression import RAW, Effort  # noqa: E402
from vmferry.transfer.frames import BuiltChunk  # noqa: E402
from vmferry.transfer.lanes import Lanes, LaneSettings  # noqa: E402
from vmferry.transfer.receiving import Lane  # noqa: E402
from vmferry.transfer.window import Window  # noqa: E402
from vmferry.transfer.wire import ChunkFrame, Received, decode_request  # noqa: E402
from vmferry.v1 import handoff_pb2_grpc, transfer_pb2  # noqa: E402

MIB: Final = 1024 * 1024
_SERVICE: Final = "vmferry.v1.DestinationService"
_PATIENCE_S: Final = 60.0
_MADE_BYTES: Final = 64 * MIB


class Sink(handoff_pb2_grpc.DestinationServiceServicer):
    """Receiving lanes that forget what they take in."""

    def __init__(self, window_bytes: int) -> None:
        self._lanes: dict[tuple[bytes, int], Lane] = {}
        self._window_bytes = window_bytes

    async def Transfer(self, request_iterator: Any, context: object) -> AsyncIterator[Any]:  # noqa: N802 - contract
        """Carry one lane."""
        del context  # gRPC hands it to every method
        opening = (await anext(aiter(request_iterator))).open
        key = (bytes(opening.migration_id), opening.lane)
        lane = self._lanes.setdefault(key, Lane(self._window_bytes))
        async for response in lane.serve(request_iterator, _forget):
            yield response


def _forget(_request: Received) -> int:
    return 0


async def _sink(arguments: argparse.Namespace) -> dict[str, Any]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    servicer = Sink(arguments.window)  # type: ignore[abstract]  # one method is all that a pump needs
    handoff_pb2_grpc.add_DestinationServiceServicer_to_server(servicer, server)
    read_requests_with(server, _SERVICE, servicer.Transfer, decode_request)
    port = server.add_secure_port(f"{arguments.listen}:0", server_credentials(TlsFiles(arguments.tls)))
    await server.start()
    _say({"port": port})
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    return {}


async def _source(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pump once to get everything going, and then as much as was asked for."""
    material = TlsFiles(arguments.tls).load()
    chunks = _Chunks(contents(arguments.contents, _MADE_BYTES), arguments.chunk)
    sending = Lanes(
        LaneSettings(
            migration_id=os.urandom(16),
            transfer_token=b"",
            open_channel=lambda: open_lane_channel(
                arguments.address, Identity.parse(arguments.peer), material
            ),
            window=Window(arguments.lanes, arguments.window * arguments.lanes, arguments.chunk),
            stall_timeout_s=_PATIENCE_S,
            reconnect_timeout_s=_PATIENCE_S,
            on_event=lambda name, facts: print(name, facts, file=sys.stderr),  # noqa: T201 - a broken pump must be noticed,
        )
    )
    try:
        await sending.open()
        # In one way only: a migration's lanes are fresh, too, when memory begins to flow.
        started, used = time.monotonic(), time.process_time()
        await sending.carry(chunks.supply(arguments.mib * MIB))
        await sending.drain()
        seconds, cpu_s = time.monotonic() - started, time.process_time() - used
        await sending.finish()
    finally:
        await sending.close()
    return {"seconds": seconds, "bytes": sending.traffic.data_bytes, "cpu_s": round(cpu_s, 3)}


class _Chunks:
    """Chunks of contents that are there already, hashed beforehand."""

    def __init__(self, content: bytes, chunk_bytes: int) -> None:
        view = memoryview(content)
        pieces = [view[at : at + chunk_bytes] for at in range(0, len(view) - chunk_bytes + 1, chunk_bytes)]
        self._pages = chunk_bytes // PAGE_SIZE
        self._made = [(piece, xxh3_128_digest(piece)) for piece in pieces]

    def supply(self, size_bytes: int) -> _Supply:
        """So many bytes of them, over and over; the last one as large as the others."""
        return _Supply(self._some(size_bytes))

    def _some(self, size_bytes: int) -> Iterator[BuiltChunk]:
        pages = self._pages
        count = -(-size_bytes // (pages * PAGE_SIZE))
        for number, (data, digest) in enumerate(islice(cycle(self._made), count)):
            head = transfer_pb2.Chunk(
                round=1,
                runs=[transfer_pb2.PageRun(first_page=number * pages, page_count=pages)],
                encoding=transfer_pb2.ENCODING_NONE,
                data_hash=digest,
            )
            effort = Effort(RAW, len(data), 0, 0.0, 0.0, 0.0)
            yield BuiltChunk(ChunkFrame(head, data, mark=False), pages, 0, len(data), effort, _nothing)


class _Supply:
    """Hands chunks to lanes."""

    def __init__(self, chunks: Iterator[BuiltChunk]) -> None:
        self._chunks = chunks
        self._lock = threading.Lock()

    def next(self, waited_s: float) -> BuiltChunk | None:
        """The next one."""
        del waited_s  # how they are made does not depend on it
        with self._lock:
            return next(self._chunks, None)


def _nothing() -> None:
    pass


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)  # noqa: T201 - what the starter waits for


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vmferry.bench.pump", description=__doc__.splitlines()[0])
    ends = parser.add_subparsers(dest="end", required=True)
    sink = ends.add_parser("sink", help="forgets what comes; ends with its input")
    sink.add_argument("--listen", default="127.0.0.1", help="address to listen at, on any free port")
    source = ends.add_parser("source", help="sends, and says how long it took")
    source.add_argument("--address", required=True, help="of the sink")
    source.add_argument("--peer", required=True, help="identity of the sink")
    source.add_argument("--lanes", type=int, required=True)
    source.add_argument("--mib", type=int, required=True)
    source.add_argument("--chunk", type=int, required=True, help="bytes of pages in a message")
    source.add_argument("--contents", required=True)
    for end in (sink, source):
        end.add_argument("--tls", type=Path, required=True, help="folder with the certificate of a host")
        end.add_argument("--window", type=int, required=True, help="bytes in flight, of each lane")
    return parser.parse_args()


def main() -> None:
    """Be one end."""
    arguments = _arguments()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_buffers()
    gc.collect()
    gc.freeze()
    _say(asyncio.run({"sink": _sink, "source": _source}[arguments.end](arguments)))


if __name__ == "__main__":
    main()
