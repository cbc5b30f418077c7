"""How late a service's event loop is: everything a service does waits for it.

Promise: a timer a tenth of a second long, again and again, and nothing else.
"""

from __future__ import annotations

import asyncio
from typing import Final, NoReturn

from vmferry.telemetry.metrics import record_loop_lag

_EVERY_S: Final = 0.1


async def watch_loop() -> NoReturn:
    """Measure until cancelled."""
    now = asyncio.get_running_loop().time
    while True:
        due = now() + _EVERY_S
        await asyncio.sleep(_EVERY_S)
        record_loop_lag(max(0.0, now() - due))
