"""A party's certificate as its files have it now, for those who connect again and again.

Promise: what is handed out worked when it was loaded, and is new as soon as all files are; files that are unusable,
or half replaced, change nothing.
"""

from __future__ import annotations

from typing import Final

from vmferry.errors import ConfigError
from vmferry.security.material import TlsFiles, TlsMaterial
from vmferry.telemetry.logs import get_logger

_LOG: Final = get_logger(__name__)


class CurrentMaterial:
    """What a party proves itself with on connections that are made from now on."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        # The look comes before the load: a change in between is seen again.
        self._seen = files.fingerprint()
        self._material = files.load()

    def get(self) -> TlsMaterial:
        """The newest that was usable."""
        seen = self._files.fingerprint()
        if seen == self._seen:
            return self._material
        try:
            self._material = self._files.load()
        except ConfigError as error:
            # Not remembered as seen: whoever replaces the files may be half done.
            _LOG.warning("certificate files unusable, the old ones stay in use", error=str(error))
        else:
            self._seen = seen
            _LOG.info("new certificate in use", directory=str(self._files.directory))
        return self._material
