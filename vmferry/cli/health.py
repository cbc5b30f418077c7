"""``vmferry health``: whether the services of this host take calls, for health checks and for people.

Promise: it asks the services themselves, on their admin listeners, which only this host's user can reach; a service
that does not answer in time is not healthy. The exit code is 0 only if every service that was asked about is SERVING.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Annotated, Any, Final

import grpc
import grpc.aio
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vmferry.cli.machine import ConfigOption
from vmferry.cli.output import JsonOption, print_document, print_table
from vmferry.config import HostConfig, load_config
from vmferry.errors import ExitCode

_ANSWER_S: Final = 5.0


class Role(StrEnum):
    """A service of this host."""

    SOURCE = "source"
    DEST = "dest"


def health(
    role: Annotated[
        Role | None, typer.Option("--role", help="Ask one service only; both by default.")
    ] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Ask the services of this host whether they take calls; exit code 0 only if they do."""
    asked = [role] if role else list(Role)
    found = asyncio.run(_ask(load_config(config), asked))
    if json:
        print_document({"services": found})
    else:
        print_table(("SERVICE", "STATUS"), list(found.items()), empty="no services")
    if set(found.values()) != {"SERVING"}:
        raise typer.Exit(ExitCode.UNREACHABLE)


async def _ask(config: HostConfig, roles: list[Role]) -> dict[str, str]:
    answers = await asyncio.gather(*(_status(config.admin_target(role)) for role in roles))
    return {str(role): answer for role, answer in zip(roles, answers, strict=True)}


async def _status(target: str) -> str:
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
