"""The bare transport as a yardstick: the same bytes over the same lanes, with no guest and nobody who looks at them.

In turn, several times: a pump (the lanes of a migration at one end, the lanes of a destination at the other, in
processes of their own, over mutual TLS; frames are encoded, numbered, encrypted, decoded, acknowledged, forgotten),
and a migration of a machine that holds as much. The ratio of the medians is what a migration makes of its transport.

    python benchmarks/transport.py [--mib N] [--repeat N] [--lanes N] [--compression KIND] [--contents KIND]
                                   [--json]

``--contents random`` cannot be compressed; ``files`` are shared libraries of this computer. The pump sends raw pages.
A slow link is made around it, by root, in a network namespace of its own::

    unshare --net sh -c 'ip link set lo up mtu 1500 &&
        tc qdisc add dev lo root tbf rate 1000mbit burst 256kb latency 50ms && python benchmarks/transport.py'
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc.aio
from xxhash import xxh3_128_digest

from dest_svc.intake import Lane
from tests.integration.hosts import Guest, World, open_world
from vmferry.memory.runs import PAGE_SIZE
from vmferry.rpc.handlers import read_requests_with
from vmferry.security.tls import SERVER_OPTIONS, TlsFiles, open_channel, server_credentials
from vmferry.transfer.compression import RAW, Effort
from vmferry.transfer.frames import BuiltChunk
from vmferry.transfer.lanes import Lanes, LaneSettings
from vmferry.transfer.wire import ChunkFrame, Received, decode_request
from vmferry.v1 import handoff_pb2_grpc, transfer_pb2
from vmferry.v1 import migration_pb2 as pb

MIB: Final = 1024 * 1024
_GUEST_MIB: Final = 16
"""What the guest keeps for itself at the beginning of its memory."""
_SPANS_ARE_WRITTEN_S: Final = 2.0
_SERVICE: Final = "vmferry.v1.DestinationService"


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


async def _forget(_request: Received) -> int:
    return 0


async def sink(tls_dir: Path, window_bytes: int) -> None:
    """Serve until the other end of standard input is closed; says its port first."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    servicer = Sink(window_bytes)
    handoff_pb2_grpc.add_DestinationServiceServicer_to_server(servicer, server)  # type: ignore[arg-type]
    read_requests_with(server, _SERVICE, servicer.Transfer, decode_request)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(TlsFiles(tls_dir)))
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


@asynccontextmanager
async def sink_process(world: World, window_bytes: int) -> AsyncIterator[str]:
    """A sink with host b's certificate in a process of its own; its address."""
    command = (sys.executable, __file__, "--sink", str(world.tls_dir("b")), "--window", str(window_bytes))
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        process.stdin.close()
        await process.wait()


async def pump(world: World, address: str, lanes: int, content: bytes, size_mib: int) -> float:
    """Megabytes per second of so many chunks over fresh lanes, from the first to the last acknowledgement."""
    config, material = world.a.config, world.material("a")
    sending = Lanes(
        LaneSettings(
            migration_id=os.urandom(16),
            transfer_token=b"",
            open_channel=lambda: open_channel(address, world.b.identity, material),
            count=lanes,
            window_bytes=config.window_bytes,
            frame_bytes=MIB,
            stall_timeout_s=30.0,
            on_event=lambda name, facts: print(name, facts, file=sys.stderr),
        )
    )
    try:
        await sending.open()
        started = time.monotonic()
        for built in _chunks(content, size_mib):
            await sending.send(built)
        await sending.drain()
        seconds = time.monotonic() - started
        await sending.finish()
    finally:
        await sending.close()
    return size_mib * MIB / seconds / 1e6


def _chunks(content: bytes, size_mib: int) -> Iterator[BuiltChunk]:
    """Chunks that were made beforehand."""
    view, pages = memoryview(content), MIB // PAGE_SIZE
    made = [(view[at : at + MIB], xxh3_128_digest(view[at : at + MIB])) for at in range(0, len(view), MIB)]
    for number, (data, digest) in enumerate(islice(cycle(made), size_mib)):
        head = transfer_pb2.Chunk(
            round=1,
            runs=[transfer_pb2.PageRun(first_page=number * pages, page_count=pages)],
            encoding=transfer_pb2.ENCODING_NONE,
            data_hash=digest,
        )
        frame = ChunkFrame(head, data, mark=False)
        yield BuiltChunk(frame, pages, 0, len(data), Effort(RAW, len(data), 0, 0.0, 0.0, 0.0), _nothing)


def _nothing() -> None:
    pass


def contents(kind: str) -> bytes:
    """64 MiB to fill memory with."""
    size = 64 * MIB
    if kind == "random":
        return os.urandom(size)
    found = bytearray()
    for path in sorted(Path("/usr/lib").rglob("*.so*")):
        if path.is_file() and len(found) < size:
            found += path.read_bytes()
    return bytes((found * (size // max(len(found), 1) + 1))[:size])


async def holding(world: World, content: bytes, size_mib: int) -> Guest:
    """A guest that sleeps, in whose memory so much lies."""
    params = {"dirty-mib-per-s": "0", "working-set-mib": "1"}
    guest = await world.run(memory_mib=size_mib + _GUEST_MIB, program="writer", params=params)
    with world.a.directory.paths(guest.spec).ram.open("r+b") as ram:
        ram.seek(_GUEST_MIB * MIB)
        left = size_mib * MIB
        while left:
            left -= ram.write(content[: min(left, len(content))])
    return guest


async def migration(
    world: World, guest: Guest, lanes: int, compression: str, *, back: bool
) -> tuple[float, pb.Migration]:
    """Megabytes per second of one crossing, while the guest ran."""
    here, there = (world.b, world.a) if back else (world.a, world.b)
    ended = await world.migrate(guest, here, there, lanes=lanes, compression=compression)
    if ended.outcome != pb.MIGRATION_OUTCOME_COMPLETED:
        raise SystemExit(f"the migration failed: {ended.reason}")
    took = {timing.phase: timing.elapsed.ToNanoseconds() / 1e9 for timing in ended.timings}
    return ended.progress.sent_bytes / took[pb.MIGRATION_PHASE_PRECOPYING] / 1e6, ended


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, in turn."""
    content = await asyncio.to_thread(contents, arguments.contents)
    bare, moved, wire = [], [], []
    async with open_world() as world:
        config, lanes = world.a.config, arguments.lanes or world.a.config.lanes
        guest = await holding(world, content, arguments.mib)
        async with sink_process(world, config.window_bytes // lanes) as address:
            await pump(world, address, lanes, content, 64)
            for number in range(arguments.repeat):
                bare.append(await pump(world, address, lanes, content, arguments.mib))
                rate, ended = await migration(
                    world, guest, lanes, arguments.compression, back=bool(number % 2)
                )
                moved.append(rate)
                wire.append(ended.progress.wire_bytes)
        await asyncio.sleep(_SPANS_ARE_WRITTEN_S)
        changes = choices(world.trace_dir)
        peaks = {
            f"{service.role}-{service.host.name}": int(service.status("VmHWM").split()[0]) // 1024
            for service in world.services
        }
    return {
        "mib": arguments.mib,
        "lanes": lanes,
        "compression": arguments.compression,
        "contents": arguments.contents,
        "mb_per_s": _spread(bare),
        "migration_mb_per_s": _spread(moved),
        "migration_wire_bytes": _spread(wire),
        "ratio": round(statistics.median(moved) / statistics.median(bare), 3),
        "peak_rss_mib": peaks,
        "choices": changes,
    }


def choices(trace_dir: Path) -> list[str]:
    """What migrations changed their compression to, and what they knew; of spans that were written out already."""
    found = []
    for path in trace_dir.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            scopes = [
                scope for resource in json.loads(line)["resourceSpans"] for scope in resource["scopeSpans"]
            ]
            for span in (span for scope in scopes for span in scope["spans"]):
                for event in span.get("events", ()):
                    if event["name"] == "compression":
                        values = {
                            one["key"]: next(iter(one["value"].values())) for one in event["attributes"]
                        }
                        found.append(
                            " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())
                        )
    return found


def _spread(figures: list[float]) -> dict[str, float]:
    return {
        "min": round(min(figures), 1),
        "median": round(statistics.median(figures), 1),
        "max": round(max(figures), 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="what is pumped, and what the guest holds")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--lanes", type=int, default=0, help="default: as configured")
    parser.add_argument("--compression", choices=["auto", "none", "lz4", "zstd"], default="auto")
    parser.add_argument("--contents", choices=["random", "files"], default="random")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sink", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--window", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sink is not None:
        asyncio.run(sink(arguments.sink, arguments.window))
        return
    found = asyncio.run(measure(arguments))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for title, key in (("bare transport", "mb_per_s"), ("migration", "migration_mb_per_s")):
        one = found[key]
        print(f"{title:<15} {one['median']:8.1f} MB/s ({one['min']:.1f} to {one['max']:.1f})")
    print(f"{'ratio':<15} {found['ratio']:8.3f}")


if __name__ == "__main__":
    main()
