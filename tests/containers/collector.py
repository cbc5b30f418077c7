"""A small OTLP receiver for a container of its own: it speaks the published protobufs and notes what it is sent.

One line of JSON for each batch of spans, each a whole ``ExportTraceServiceRequest``, goes to the file that is named.
"""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Traces(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def Export(self, request: Any, _context: object) -> Any:  # noqa: N802 - named by its protocol
        """Note a batch."""
        with self._lock:
            self._file.write(MessageToJson(request, indent=None) + "\n")
            self._file.flush()
        return trace_service_pb2.ExportTraceServiceResponse()


class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Takes metrics, and forgets them."""

    def Export(self, _request: object, _context: object) -> Any:  # noqa: N802 - named by its protocol
        """Answer that all is well."""
        return metrics_service_pb2.ExportMetricsServiceResponse()


def main() -> None:
    """Serve until told to stop."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(Path(sys.argv[1])), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    server.add_insecure_port("0.0.0.0:4317")
    server.start()
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})
    server.stop(1).wait()


if __name__ == "__main__":
    main()
