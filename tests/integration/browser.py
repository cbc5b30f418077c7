"""A real browser without a screen: Chromium, driven by its DevTools protocol.

Promise: everything that the page did not like is collected: exceptions, messages of the console, violations of its
policy, requests that failed; the browser and its profile are gone at the end.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from tests.integration.services import eventually, eventually_async
from tests.support import require

_FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0"),
)
_CALL_S: Final = 30.0
ARTIFACTS: Final = Path(__file__).resolve().parents[2] / "artifacts"
"""Where screenshots are kept; not in the repository."""


class Tab:
    """One page of a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self.requested: list[str] = []
        """Addresses of everything that was loaded."""
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def read(self) -> None:
        """Take in what the browser says, until it is closed."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            else:
                self._hear(said["method"], said["params"])

    def _hear(self, method: str, about: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requested.append(about["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(f"{about['entry']['level']}: {about['entry']['text']}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(about["args"]))

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        said = await asyncio.wait_for(answer, _CALL_S)
        assert "error" not in said, said
        found: dict[str, Any] = said["result"]
        return found

    async def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        said = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, script: str, what: str) -> Any:
        """Wait until an expression in the page is true."""
        # An element has no value outside of the page; that it is there is enough.
        seen = f"(() => {{ const found = {script}; return found instanceof Node || found }})()"
        return await eventually_async(lambda: self.ask(seen), what)

    async def text(self, selector: str) -> str:
        """What an element says."""
        found: str = await self.ask(f"document.querySelector({selector!r})?.innerText ?? ''")
        return found

    async def open(self, address: str) -> None:
        """Go to an address, with everything watched."""
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'", "the page is loaded")

    async def look_as(self, *, dark: bool = False, width: int = 1180, height: int = 900) -> None:
        """Take another scheme of colours, or the size of another screen."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        calm = {"name": "prefers-reduced-motion", "value": "reduce"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme, calm])
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    async def press(self, key: str, code: int = 0) -> None:
        """Type a key."""
        typed = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            shown = typed if kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **shown)

    async def picture(self, name: str) -> Path:
        """Keep what the whole page looks like."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"{name}.png"
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@contextlib.asynccontextmanager
async def open_tab() -> AsyncIterator[Tab]:
    """A browser with one empty page."""
    if why_not := os.environ.get("VMFERRY_NO_BROWSER"):
        pytest.skip(why_not)
    require(shutil.which("chromium"), "chromium is not installed (apt install chromium)")
    with tempfile.TemporaryDirectory(prefix="vf-browser-", ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            *("chromium", *_FLAGS, f"--user-data-dir={profile}", "about:blank"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"HOME": profile, "TMPDIR": profile},
        )
        try:
            where = Path(profile) / "DevToolsActivePort"
            lines = await eventually(
                lambda: where.exists() and where.read_text(encoding="ascii").splitlines(),
                "it starts",
                seconds=60,
            )
            async with aiohttp.ClientSession(f"http://127.0.0.1:{lines[0]}") as session:
                async with session.get("/json/list") as answer:
                    pages = [one for one in await answer.json() if one["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    reader = asyncio.create_task(tab.read())
                    try:
                        yield tab
                    finally:
                        reader.cancel()
                        await asyncio.gather(reader, return_exceptions=True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
