"""Whether a host is well, by the checks of a plan.

Promise: a host counts as healthy when every check passes one after the other in one go; one that does not answer is
not healthy, whatever the cause; nothing that a check does outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vmferry.client.source import SourceClient
from vmferry.errors import VmferryError
from vmferry.fleet.plan import COMMAND, HTTP, Check, HostPlan, Plan

_TRY_S: Final = 10.0
_PAUSE_S: Final = 0.5
_SHOWN_CHARS: Final = 300


async def wait_healthy(plan: Plan, host: HostPlan, tls_dir: Path) -> str:
    """Wait until a host is well; returns what is wrong with it if it is not in time, or nothing."""
    deadline = time.monotonic() + plan.update.health_timeout_s
    while wrong := await unhealthy(plan, host, tls_dir):
        if time.monotonic() > deadline:
            return f"not healthy within {plan.update.health_timeout_s:g} s: {wrong}"
        await asyncio.sleep(_PAUSE_S)
    return ""


async def unhealthy(plan: Plan, host: HostPlan, tls_dir: Path) -> str:
    """What is wrong with a host now; nothing if all is well."""
    for check in plan.health:
        wrong = ""
        try:
            async with asyncio.timeout(_TRY_S):
                wrong = await _failed(check, host, tls_dir)
        except TimeoutError:
            wrong = f"no answer within {_TRY_S:g} s"
        except (OSError, VmferryError) as error:
            wrong = str(error) or repr(error)
        if wrong:
            return f"{check.kind} check: {wrong}"
    return ""


async def _failed(check: Check, host: HostPlan, tls_dir: Path) -> str:
    if check.kind == COMMAND:
        code, output = await run(filled(check.command, host))
        return f"exit code {code}: {output}" if code else ""
    if check.kind == HTTP:
        return await _wrong_at(check.url.replace("{name}", host.name))
    async with SourceClient.open(host.source, host.host, tls_dir) as source:
        health = health_pb2_grpc.HealthStub(source.channel)
        try:
            answer = await health.Check(
                health_pb2.HealthCheckRequest(service="vmferry.v1.SourceService"), timeout=_TRY_S
            )
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return "" if status == "SERVING" else f"the source service is {status}"


async def _wrong_at(url: str) -> str:
    import aiohttp  # noqa: PLC0415 - a fifth of what every command takes to start, and few have such a check

    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return "" if answer.status == 200 else f"{url} answers {answer.status}"  # noqa: PLR2004 - OK
    except aiohttp.ClientError as error:
        return str(error) or repr(error)


def filled(command: Sequence[str], host: HostPlan) -> list[str]:
    """A command of the plan, for one host."""
    return [part.replace("{name}", host.name) for part in command]


async def run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command; its exit code and the end of what it said. It is ended if the caller is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace").strip()[-_SHOWN_CHARS:]
