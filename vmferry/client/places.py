"""Where a caller's words lead: addresses and identities of hosts, checked before anything is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vmferry.errors import InvalidArgumentError
from vmferry.security.identity import Identity, Kind
from vmferry.v1.migration_pb2 import Destination

_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_MAX_PORT: Final = 65_535


@dataclass(frozen=True)
class Target:
    """A host to go to."""

    host: str
    """SPIFFE identity that its certificate must carry, such as ``spiffe://example.org/vmhost/b``."""
    address: str
    """``HOST:PORT`` of its destination service, as the source reaches it."""

    def message(self, *, host_field: str = "host", address_field: str = "address") -> Destination:
        """The same as the contract has it.

        Raises:
            InvalidArgumentError: host or address have the wrong form; the field is named as asked for.
        """
        return Destination(
            host=host_identity(self.host, field=host_field).uri,
            address=check_address(self.address, field=address_field),
        )


def check_address(text: str, *, field: str) -> str:
    """Return ``text`` if it is HOST:PORT.

    Raises:
        InvalidArgumentError: it is anything else.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= _MAX_PORT:
        raise InvalidArgumentError(f"{text!r} is not of the form HOST:PORT", field=field)
    return text


def host_identity(uri: str, *, field: str) -> Identity:
    """Read the identity of a host.

    Raises:
        InvalidArgumentError: it is malformed, or not a host's.
    """
    identity = Identity.parse(uri, field=field)
    if identity.kind is not Kind.VMHOST:
        raise InvalidArgumentError(
            f"{uri} is not a host: it must be spiffe://DOMAIN/vmhost/NAME", field=field
        )
    return identity
