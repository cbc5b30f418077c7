"""Spans reach the disk, and what reached it survives its writer."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from tests.support import wait_until
from vmferry.errors import ConfigError
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity
from vmferry.telemetry.recording import SpanFileExporter
from vmferry.telemetry.spans import load_spans, span_tree

PROGRAM = """
import sys
from pathlib import Path
from vmferry.telemetry.tracing import configure, current_trace_id, phase

shutdown = configure("source", Path(sys.argv[1]), host="host-a")
with phase("migrate"):
    with phase("precopy", rounds=2):
        print(current_trace_id(), flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
shutdown()
"""


@contextmanager
def _program(directory: Path, how: str, program: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that records spans; with ``wait`` it stays inside of its outer span until its input ends."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | {"PYTHONPATH": str(Path.cwd())} | environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _finished(directory: Path, *, program: str = PROGRAM, **environment: str) -> str:
    """Run the process to its end; gives the trace's id."""
    with _program(directory, "end", program, **environment) as process:
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert not errors
    return output.strip()


WRITES_NOW = """
import sys
from pathlib import Path
from vmferry.telemetry.recording import write_spans
from vmferry.telemetry.spans import load_spans
from vmferry.telemetry.tracing import configure, current_trace_id, phase

configure("source", Path(sys.argv[1]), host="host-a")
with phase("migrate"):
    for number in range(20):
        with phase(f"round {number}"):
            pass
        write_spans()
        assert len(load_spans([Path(sys.argv[1])], current_trace_id())) == number + 1
"""


def test_a_span_is_in_the_file_once_it_is_asked_for(tmp_path: Path) -> None:
    """Not only a fraction of a second after its end."""
    _finished(tmp_path, program=WRITES_NOW)


def test_shutdown_writes_every_ended_span(tmp_path: Path) -> None:
    """After shutdown the file, which only its owner may read, tells the whole tree with service and host."""
    trace_id = _finished(tmp_path / "traces")
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name.startswith("source-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    spans = load_spans([tmp_path / "traces"], trace_id)
    (root,) = span_tree(spans)
    assert (root.span.name, root.span.parent_id) == ("migrate", "")
    assert [child.span.name for child in root.children] == ["precopy"]
    assert {(span.service, span.host) for span in spans} == {("source", "host-a")}


def test_file_is_parseable_after_kill(tmp_path: Path) -> None:
    """A span that ended shortly before kill -9 is on disk, in whole lines, while the open one is lost."""
    with _program(tmp_path, "wait", PROGRAM) as process:
        assert process.stdout is not None
        trace_id = process.stdout.readline().strip()
        (path,) = tmp_path.iterdir()
        wait_until(lambda: path.stat().st_size > 0, what="the flush of the ended span")
        process.kill()
        process.wait(timeout=10)
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line)
    (span,) = load_spans([tmp_path], trace_id)
    assert span.name == "precopy"
    assert [node.span for node in span_tree([span])] == [span], (
        "a span whose parent was lost stands by itself"
    )


def test_lines_are_otlp(tmp_path: Path) -> None:
    """Each line is OTLP's JSON: hexadecimal ids, numbers for enums, and nothing that the schema does not know."""
    trace_id = _finished(tmp_path)
    (path,) = tmp_path.iterdir()
    for line in path.read_text(encoding="utf-8").splitlines():
        ParseDict(json.loads(line), TracesData())
        for span in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            assert span["traceId"] == trace_id
            assert len(bytes.fromhex(span["spanId"])) == 8
            assert isinstance(span["kind"], int)


def test_environment_has_the_last_word(tmp_path: Path) -> None:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override what the program says of itself."""
    environment = {"OTEL_SERVICE_NAME": "ferry", "OTEL_RESOURCE_ATTRIBUTES": "host.name=elsewhere"}
    spans = load_spans([tmp_path], _finished(tmp_path, **environment))
    assert {(span.service, span.host) for span in spans} == {("ferry", "elsewhere")}


def test_disabled_sdk_records_nothing(tmp_path: Path) -> None:
    """OTEL_SDK_DISABLED leaves no file, and no trace."""
    assert _finished(tmp_path / "traces", OTEL_SDK_DISABLED="true") == ""
    assert not (tmp_path / "traces").exists()


async def test_collector_named_by_the_environment_gets_the_spans(tmp_path: Path) -> None:
    """OTEL_EXPORTER_OTLP_ENDPOINT sends the same spans to a collector, beside the file."""
    received: list[str] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the protocol's name
            received.extend(
                span.name
                for batch in request.resource_spans
                for scope in batch.scope_spans
                for span in scope.spans
            )
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    trace_id = await asyncio.to_thread(_finished, tmp_path, **environment)
    await server.stop(None)
    assert sorted(received) == ["migrate", "precopy"]
    assert len(load_spans([tmp_path], trace_id)) == 2


@dataclass(frozen=True)
class Batch:
    """What a collector saw of one batch of spans."""

    spans: list[str]
    headers: dict[str, str]
    peer: list[bytes]


@asynccontextmanager
async def guarded_collector(folder: Path) -> AsyncIterator[tuple[dict[str, str], list[Batch]]]:
    """A collector that wants a certificate from everybody: the environment that leads to it, and its batches."""
    batches: list[Batch] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
            names = [s.name for b in request.resource_spans for c in b.scope_spans for s in c.spans]
            batches.append(
                Batch(
                    names,
                    dict(context.invocation_metadata()),
                    context.auth_context().get("peer_spiffe_id", []),
                )
            )
            return trace_service_pb2.ExportTraceServiceResponse()

    init_authority(folder / "ca", "test.example")
    issue(folder / "ca", Identity.parse("spiffe://test.example/vmhost/a"), folder / "a")
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    (folder / "collector.pem").write_bytes(pem)
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_secure_port(
        "localhost:0",
        grpc.ssl_server_credentials(
            [(key_pem, pem)], (folder / "a/ca.pem").read_bytes(), require_client_auth=True
        ),
    )
    await server.start()
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"https://localhost:{port}",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(folder / "collector.pem"),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(folder / "a/tls.crt"),
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(folder / "a/tls.key"),
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20swordfish,tenant=blue",
        "OTEL_METRICS_EXPORTER": "none",
    }
    try:
        yield environment, batches
    finally:
        await server.stop(None)


async def test_collector_may_want_a_certificate_and_a_token(tmp_path: Path) -> None:
    """Mutual TLS and headers are as the environment has them, and the token stands in no output."""
    async with guarded_collector(tmp_path) as (environment, batches):
        trace_id = await asyncio.to_thread(
            _finished, tmp_path / "traces", program=TLS13 + PROGRAM, **environment
        )
    assert trace_id
    assert sorted(name for batch in batches for name in batch.spans) == ["migrate", "precopy"]
    for batch in batches:
        assert batch.headers["authorization"] == "Bearer swordfish"
        assert batch.headers["tenant"] == "blue"
        assert batch.peer == [b"spiffe://test.example/vmhost/a"]


async def test_collector_that_trusts_us_not_gets_nothing_and_holds_nothing_up(tmp_path: Path) -> None:
    """Without a certificate no span gets through; the file has them all the same, and the token is not told."""
    async with guarded_collector(tmp_path) as (environment, batches):
        for name in ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_KEY"):
            del environment[name]
        environment["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1"
        with _program(tmp_path / "traces", "end", TLS13 + PROGRAM, **environment) as process:
            output, errors = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == 0
    assert batches == []
    assert len(load_spans([tmp_path / "traces"], output.strip())) == 2
    assert "swordfish" not in errors


TLS13 = """
from vmferry.security.tls13 import enforce_tls13
enforce_tls13()
"""
METRICS = """
import sys
from pathlib import Path
from vmferry.telemetry.metrics import record_prediction_error
from vmferry.telemetry.tracing import configure

shutdown = configure("source", Path(sys.argv[1]), host="host-a")
record_prediction_error(kind="qemu", total=1.3, downtime=0.7)
record_prediction_error(kind="qemu", total=0.9, downtime=2.5)
shutdown()
"""


async def test_collector_named_by_the_environment_gets_the_metrics(tmp_path: Path) -> None:
    """OTEL_EXPORTER_OTLP_ENDPOINT sends what was recorded before the end, under the names of the conventions."""
    received: dict[str, Any] = {}

    class Collector(metrics_service_pb2_grpc.MetricsServiceServicer):
        async def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the protocol's name
            for batch in request.resource_metrics:
                for scope in batch.scope_metrics:
                    received.update({metric.name: metric for metric in scope.metrics})
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.aio.server()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    await asyncio.to_thread(_finished, tmp_path, program=METRICS, **environment)
    await server.stop(None)
    assert set(received) == {"vmferry.prediction.total_error", "vmferry.prediction.downtime_error"}
    (point,) = received["vmferry.prediction.total_error"].histogram.data_points
    assert (point.count, point.sum) == (2, pytest.approx(2.2))
    assert [(one.key, one.value.string_value) for one in point.attributes] == [("vmferry.kind", "qemu")]


@pytest.fixture
def span() -> ReadableSpan:
    provider = TracerProvider(resource=Resource({"host.name": "h"}), shutdown_on_exit=False)
    ended = provider.get_tracer("test").start_span("copy")
    ended.end()
    assert isinstance(ended, ReadableSpan)
    return ended


def test_torn_line_does_not_spoil_the_next(tmp_path: Path, span: ReadableSpan) -> None:
    """A process with the number, and so the file, of one that was killed while writing starts a line of its own."""
    path = tmp_path / "source-1.jsonl"
    path.write_bytes(b'{"resourceSpans":[{"reso')
    exporter = SpanFileExporter(path)
    assert exporter.export([span]) is SpanExportResult.SUCCESS
    assert exporter.export([span]) is SpanExportResult.SUCCESS
    exporter.shutdown()
    assert len(path.read_bytes().splitlines()) == 3
    (found,) = load_spans([tmp_path], format(span.context.trace_id, "032x"))
    assert found.name == "copy"


def test_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    """A trace folder that is a file is refused at the start, naming the setting."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        SpanFileExporter(tmp_path / "file" / "source-1.jsonl")
    assert caught.value.field == "trace_dir"
