"""docs/grpcurl.md works as pasted: run from top to bottom, with buf in the place of grpcurl."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

from tests.grpcurl.page import Call, calls, script
from tests.integration.buf import find_buf
from tests.support import require
from vmferry.cli.demo_hosts import two_hosts
from vmferry.cli.machine import run_machine
from vmferry.cli.playground import MACHINE, PORTS
from vmferry.machines.spec import new_spec

ROOT = Path(__file__).parents[2]
LIMIT_S = 100.0


async def test_the_page_works_as_pasted(tmp_path: Path) -> None:
    """Every call is answered, or refused for the reason that the page says, and there is no other call."""
    buf = find_buf()
    require(buf, "buf (npm @bufbuild/buf), on the PATH or named by VMFERRY_BUF")
    require(shutil.which("jq"), "jq")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "grpcurl").write_text(
        f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("shim.py")} "$@"\n'
    )
    (tools / "grpcurl").chmod(0o755)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    noted = tmp_path / "calls.jsonl"
    text = script()
    async with two_hosts(tmp_path / "playground") as world:
        await run_machine(new_spec(MACHINE, 64, "canary"), world.a.host.config)
        # The playground's ports are always the same, and others may have them while tests run.
        for shore in (world.a, world.b):
            ports = PORTS[shore.host.name]
            text = text.replace(f"127.0.0.1:{ports.source}", shore.source.address)
            text = text.replace(f"127.0.0.1:{ports.dest}", shore.dest.address)
        process = await asyncio.create_subprocess_exec(
            *("bash", "-u"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(noted), "BUF": str(buf)},
        )
        said, _ = await asyncio.wait_for(process.communicate(text.encode()), LIMIT_S)
    made = [json.loads(line) for line in noted.read_text(encoding="utf-8").splitlines()]
    found = [Call(call["method"], call["refused"]) for call in made]
    others = [
        f"{there} instead of {meant}" for there, meant in zip(found, calls(), strict=False) if there != meant
    ]
    assert not others, f"{said.decode()}\n{others}"
    assert len(found) == len(calls()), said.decode()
