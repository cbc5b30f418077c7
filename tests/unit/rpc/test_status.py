"""Errors keep their meaning on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from vmferry.errors import (
    CancelledByCallerError,
    IncompatibleError,
    InternalError,
    PeerUnreachableError,
    TimedOutError,
    VmferryError,
    catalogue,
)
from vmferry.rpc.status import from_rpc_error, to_grpc_status

METHOD = "/vmferry.test.Thrower/Throw"


class Thrower:
    """A server whose one method aborts with the status it was given."""

    status: grpc.Status

    async def throw(self, _request: bytes, context: Any) -> bytes:
        """Abort with the status."""
        await context.abort_with_status(self.status)
        return b""


@pytest.fixture
async def thrower() -> AsyncIterator[tuple[Thrower, grpc.aio.Channel]]:
    service = Thrower()
    handlers = {"Throw": grpc.unary_unary_rpc_method_handler(service.throw)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("vmferry.test.Thrower", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield service, channel
    await server.stop(None)


async def _caught(thrower: tuple[Thrower, grpc.aio.Channel], status: grpc.Status) -> grpc.aio.AioRpcError:
    service, channel = thrower
    service.status = status
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(METHOD)(b"", timeout=10)
    return caught.value


@pytest.mark.parametrize("reason", sorted(catalogue()))
async def test_every_error_survives_the_wire(thrower: tuple[Thrower, grpc.aio.Channel], reason: str) -> None:
    """Class, code, message, field, metadata and remedy of each error of the catalogue arrive as they were raised."""
    cls = catalogue()[reason]
    sent = cls(
        "Grüße: 100 % of it failed\nat once", field="options.lanes", remedy="Do this.", machine="m1", count=7
    )
    error = await _caught(thrower, to_grpc_status(sent))
    got = from_rpc_error(error)
    assert error.code().name == cls.code
    assert type(got) is cls
    assert (got.message, got.field, got.instance_remedy) == (sent.message, "options.lanes", "Do this.")
    assert got.metadata == {"machine": "m1", "count": "7"}


async def test_class_remedy_travels_when_the_error_has_no_own(
    thrower: tuple[Thrower, grpc.aio.Channel],
) -> None:
    """A client learns the remedy even if its own catalogue words it differently."""
    status = rpc_status.from_call(await _caught(thrower, to_grpc_status(TimedOutError("late"))))
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason, info.metadata["remedy"]) == (
        "vmferry",
        "TIMED_OUT",
        TimedOutError.remedy,
    )


async def test_field_travels_as_bad_request(thrower: tuple[Thrower, grpc.aio.Channel]) -> None:
    """Any gRPC client finds the field at fault in the standard detail; without a field there is no such detail."""
    with_field = rpc_status.from_call(
        await _caught(thrower, to_grpc_status(InternalError("x", field="lanes")))
    )
    violations = BadRequest()
    assert with_field.details[1].Unpack(violations)
    assert [violation.field for violation in violations.field_violations] == ["lanes"]
    without = rpc_status.from_call(await _caught(thrower, to_grpc_status(InternalError("x"))))
    assert len(without.details) == 1


async def test_huge_error_still_arrives_as_itself(thrower: tuple[Thrower, grpc.aio.Channel]) -> None:
    """An error far beyond gRPC's limit for metadata is shortened, not turned into another error."""
    metadata = {f"item{number}": "ü" * 3000 for number in range(50)}
    sent = IncompatibleError("ä€" * 20_000, field="f" * 5000, remedy="r" * 9000, **metadata)
    got = from_rpc_error(await _caught(thrower, to_grpc_status(sent)))
    assert type(got) is IncompatibleError
    assert got.message.startswith("ä€ä€")
    assert got.message.endswith("…")
    assert got.metadata["item0"].startswith("üü")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("UNAVAILABLE", PeerUnreachableError),
        ("DEADLINE_EXCEEDED", TimedOutError),
        ("CANCELLED", CancelledByCallerError),
        ("UNIMPLEMENTED", InternalError),
        ("UNKNOWN", InternalError),
    ],
)
@pytest.mark.parametrize("details", ["none", "foreign domain", "unknown reason", "garbage", "wrong code"])
async def test_bare_codes_become_errors_of_the_catalogue(
    thrower: tuple[Thrower, grpc.aio.Channel], code: str, expected: type[VmferryError], details: str
) -> None:
    """Without a reason of ours the code decides, and malformed details of a peer change nothing about that."""
    status = Status(code=grpc.StatusCode[code].value[0], message="said the proxy")
    info = {
        "foreign domain": ErrorInfo(domain="example.org", reason="MACHINE_BUSY"),
        "unknown reason": ErrorInfo(domain="vmferry", reason="FROM_THE_FUTURE"),
    }.get(details)
    if info is not None:
        status.details.add().Pack(info)
    if details == "garbage":
        status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff\xff")
    converted = rpc_status.to_status(status)
    if details == "wrong code":
        contradiction = Status(code=3, message="said the proxy").SerializeToString()
        converted = converted._replace(trailing_metadata=(("grpc-status-details-bin", contradiction),))
    got = from_rpc_error(await _caught(thrower, converted))
    assert type(got) is expected
    assert got.metadata["grpc_code"] == code
    assert "said the proxy" in got.message


async def test_nobody_listens() -> None:
    """A host that is not there is a PeerUnreachableError."""
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD)(b"", timeout=10)
    assert type(from_rpc_error(caught.value)) is PeerUnreachableError
