"""Errors on the wire: the catalogue of :mod:`vmferry.errors` as ``google.rpc.Status``, and back.

Promise: an error raised on one host is raised again as the same class on the other, with its message, field, remedy
and metadata; whatever a peer, a proxy or the transport answers besides becomes an error of the catalogue too, so a
caller has one family of exceptions to handle. The answer always fits into gRPC's limit for metadata.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from vmferry.errors import (
    CancelledByCallerError,
    InternalError,
    PeerUnreachableError,
    TimedOutError,
    VmferryError,
    catalogue,
)

DOMAIN: Final = "vmferry"
"""``ErrorInfo.domain`` of every error of this catalogue."""
REMEDY_KEY: Final = "remedy"
"""Key of ``ErrorInfo.metadata`` under which the remedy travels."""

# gRPC refuses metadata beyond 8 KiB. The message counts up to four times: three bytes per byte in the percent-encoded
# header, and once more inside the details.
_MESSAGE_LIMIT: Final = 1024
_VALUE_LIMIT: Final = 512
_METADATA_LIMIT: Final = 2048


def to_grpc_status(error: VmferryError) -> grpc.Status:
    """The status with which a call that met ``error`` ends."""
    message = _clipped(error.message, _MESSAGE_LIMIT)
    info = ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_clipped_metadata(error))
    status = Status(code=grpc.StatusCode[error.code].value[0], message=message)
    status.details.append(_packed(info))
    if error.field:
        field = _clipped(error.field, _VALUE_LIMIT)
        violation = BadRequest.FieldViolation(field=field, description=_clipped(message, _VALUE_LIMIT))
        status.details.append(_packed(BadRequest(field_violations=[violation])))
    converted: grpc.Status = rpc_status.to_status(status)
    return converted


def from_rpc_error(error: Any) -> VmferryError:
    """The error that the other side raised, or the one that tells best what the transport met."""
    info, bad_request = _details(error)
    known = catalogue().get(info.reason) if info.domain == DOMAIN else None
    if known is None:
        return _from_bare_code(error, info)
    metadata = dict(info.metadata)
    field = bad_request.field_violations[0].field if bad_request.field_violations else ""
    found = known(error.details() or "", field=field, remedy=metadata.pop(REMEDY_KEY, ""))
    found.metadata.update(metadata)
    return found


def _details(error: Any) -> tuple[ErrorInfo, BadRequest]:
    info, bad_request = ErrorInfo(), BadRequest()
    # AioRpcError is a snapshot whose methods answer at once, so the synchronous reader serves it; its own module for
    # asyncio wants a live call. A peer whose details are malformed or contradict its status is taken at its status.
    try:
        status: Status | None = rpc_status.from_call(error)
        for detail in status.details if status else ():
            _ = detail.Unpack(info) or detail.Unpack(bad_request)
    except (ValueError, DecodeError):
        return ErrorInfo(), BadRequest()
    return info, bad_request


def _from_bare_code(error: Any, info: ErrorInfo) -> VmferryError:
    code, details = error.code(), error.details() or "no details"
    metadata = {"grpc_code": code.name} | ({"peer_reason": info.reason} if info.reason else {})
    if code is grpc.StatusCode.UNAVAILABLE:
        return PeerUnreachableError(f"the other host does not answer: {details}", **metadata)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOutError(f"the call took longer than its limit: {details}", **metadata)
    if code is grpc.StatusCode.CANCELLED:
        return CancelledByCallerError(f"the call was cancelled: {details}", **metadata)
    return InternalError(f"the other host answered {code.name}: {details}", **metadata)


def _packed(message: ErrorInfo | BadRequest) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _clipped_metadata(error: VmferryError) -> dict[str, str]:
    found: dict[str, str] = {}
    left = _METADATA_LIMIT
    for key, value in ({REMEDY_KEY: error.instance_remedy} | error.metadata).items():
        short = _clipped(value, _VALUE_LIMIT)
        left -= len(key.encode()) + len(short.encode())
        if left < 0:
            break
        found[key] = short
    return found


def _clipped(text: str, limit: int) -> str:
    raw = text.encode(errors="replace")
    if len(raw) <= limit:
        return raw.decode()
    return raw[: limit - 3].decode(errors="ignore") + "…"


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn errors of a stream into the catalogue's; one of the transport means that it may be opened again."""
    try:
        yield
    except grpc.RpcError as error:
        failure = from_rpc_error(error)
        if "grpc_code" in failure.metadata:
            # The transport speaks, not the other side: the stream broke, whatever the code.
            raise PeerUnreachableError(failure.message, **failure.metadata) from error
        raise failure from error
