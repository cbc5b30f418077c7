"""The file that says that this host is being emptied; the source service writes it, both services read it.

Promise: it is replaced whole and is on disk before anything follows from it; what it says counts for the next
newcomer, without a restart. One that cannot be read counts as "being emptied": no newcomer is taken by mistake.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from google.protobuf.json_format import MessageToJson, Parse, ParseError

from vmferry.errors import ConfigError
from vmferry.security.files import PRIVATE_MODE, write_atomic
from vmferry.v1.drain_pb2 import DrainRecord

FILE_NAME: Final = "drain.json"


class DrainFile:
    """One host's file."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / FILE_NAME
        self._seen: tuple[int, int, int] | None = None
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether this host is being emptied, by what is on disk now."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        seen = status.st_mtime_ns, status.st_ino, status.st_size
        if seen != self._seen:
            try:
                record = self.read()
            except ConfigError:
                return True
            self._draining = record is not None and record.draining
            self._seen = seen
        return self._draining

    def read(self) -> DrainRecord | None:
        """What is on disk; ``None`` if this host was never drained.

        Raises:
            ConfigError: the file is there and cannot be read.
        """
        if not self.path.exists():
            return None
        remedy = f"Look at {self.path}; drain the host anew (vmferry drain), or undo it (vmferry undrain)."
        try:
            return Parse(self.path.read_bytes(), DrainRecord(), ignore_unknown_fields=True)
        except (OSError, ParseError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self.path} cannot be read: {error}", field=FILE_NAME, remedy=remedy
            ) from error

    def write(self, record: DrainRecord) -> None:
        """Put a record in place of what was there; it survives a crash of the host.

        Raises:
            ConfigError: the disk does not take it; what was there stays.
        """
        text = MessageToJson(record, preserving_proto_field_name=True)
        write_atomic(self.path, text.encode(), mode=PRIVATE_MODE)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
