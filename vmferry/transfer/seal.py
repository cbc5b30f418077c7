"""The digest that seals an attempt. Pure.

Promise: equal digests mean that both hosts hold the same memory, device state and machine description for the same
attempt; it is computed at each end from what that end holds, never copied from the other's message.
"""

from __future__ import annotations

import hashlib

from vmferry.handoff.states import Attempt


def seal_digest(attempt: Attempt, *, memory_root: bytes, device_state: bytes, spec_digest: bytes) -> bytes:
    """The digest of everything that is handed over: 32 bytes."""
    sealed = hashlib.sha256(b"vmferry seal v1")
    for part in (
        attempt.machine_id.encode(),
        attempt.migration_id,
        attempt.number.to_bytes(8, "big"),
        attempt.epoch_from.to_bytes(8, "big"),
        memory_root,
        hashlib.sha256(device_state).digest(),
        spec_digest,
    ):
        sealed.update(len(part).to_bytes(4, "big"))
        sealed.update(part)
    return sealed.digest()
