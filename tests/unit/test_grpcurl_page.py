"""docs/grpcurl.md has a line for every method that anybody may call."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool, json_format, symbol_database
from google.protobuf.descriptor import MethodDescriptor

import vmferry.v1
from tests.grpcurl.page import PAGE, calls
from vmferry.security.authorization import TABLE

BY_REFLECTION = "/grpc.reflection."
"""What ``list`` calls; nobody calls it by hand."""


@pytest.mark.parametrize("method", sorted(name for name in TABLE if not name.startswith(BY_REFLECTION)))
def test_every_method_has_a_line(method: str) -> None:
    """A method that is missing on the page fails, with a line to begin with."""
    listed = {f"/{call.method}" for call in calls()}
    if method not in listed:
        pytest.fail(
            f"docs/grpcurl.md has no line for {method}. Put one like this into the chapter where it belongs:\n\n"
            f"{_line(method)}\n\n"
            "If it is meant to be refused there, end it with '# refused: REASON', the reason of vmferry/errors.py; "
            "tests/grpcurl runs the page from top to bottom."
        )


def test_reflection_is_on_the_page() -> None:
    """The page lists services on data ports and on the admin listener."""
    assert sum(call.method == "list" for call in calls()) >= 3


def test_no_line_is_for_a_method_that_is_gone() -> None:
    """Each of our methods on the page is one that somebody may call."""
    ours = {f"/{call.method}" for call in calls() if call.method.startswith("vmferry.")}
    assert ours <= set(TABLE), f"{PAGE.name} has lines for what is not there any more"


def _line(method: str) -> str:
    """A line for a method, with every field of its request."""
    for path in Path(vmferry.v1.__path__[0]).glob("*_pb2.py"):
        importlib.import_module(f"vmferry.v1.{path.stem}")
    service, _, name = method.removeprefix("/").partition("/")
    found: MethodDescriptor = descriptor_pool.Default().FindServiceByName(service).FindMethodByName(name)
    request = symbol_database.Default().GetSymbol(found.input_type.full_name)()  # type: ignore[attr-defined]
    shown = json_format.MessageToDict(request, always_print_fields_with_no_presence=True)
    return f"as operator a -d '{json.dumps(shown)}' $A_SOURCE {service}/{name}"
