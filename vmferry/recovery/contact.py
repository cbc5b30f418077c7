"""The newest word between this host and the other end of an attempt.

Promise: it is told as it was heard, with the time by this host's clock; nothing decides by it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from vmferry.errors import VmferryError
from vmferry.handoff.blocked import Word
from vmferry.handoff.states import AttemptState

NOTHING: Final = Word()


@dataclass
class Contact:
    """What one service heard from one peer since the service started."""

    heard_unix_ns: int = 0
    """When the peer was last heard, by this host's clock; 0 if it was not."""
    heard: str = ""
    """What it said, or asked for."""
    failure: str = ""
    """Why it could not be asked since then; empty if it could."""
    word: Word = NOTHING

    def hear(self, what: str) -> None:
        """The peer said, or asked for, something."""
        self.heard_unix_ns = time.time_ns()
        self.heard = what
        self.failure = ""

    def hear_state(self, state: AttemptState, *, lost_journal: bool) -> None:
        """The peer said how the attempt stands there."""
        self.hear(state.name.lower())
        self.word = Word(state, lost_journal)

    def fail(self, error: VmferryError) -> None:
        """The peer could not be asked, or refused to answer."""
        self.failure = f"{error.reason}: {error.message}"
        if error.field == "attempt.destination_incarnation":
            self.word = Word(self.word.state, lost_journal=True)
