"""Shuts TLS 1.2 out of this process.

Promise: after :func:`enforce_tls13`, no handshake of this process ends in a version below TLS 1.3. gRPC's Python
interface has no setting for the version, but it has one for the cipher suites of TLS 1.2: left with a single suite
that needs an RSA certificate, while every certificate of vmferry has an elliptic-curve key (``material`` refuses
others), a TLS 1.2 handshake finds no common suite. The suites of TLS 1.3 are another list and stay as they are.

This module must not import grpc, which may read the variable as soon as it is loaded.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from vmferry.errors import InternalError

VARIABLE: Final = "GRPC_SSL_CIPHER_SUITES"
RSA_ONLY_SUITE: Final = "ECDHE-RSA-AES256-GCM-SHA384"


def enforce_tls13() -> None:
    """Set what shuts out TLS 1.2; the first thing a program does.

    Raises:
        InternalError: grpc was imported before with another setting, so that it may come too late.
    """
    if os.environ.get(VARIABLE) == RSA_ONLY_SUITE:
        return
    if "grpc" in sys.modules:
        raise InternalError(
            f"enforce_tls13() must come before the first import of grpc, which reads {VARIABLE}"
        )
    os.environ[VARIABLE] = RSA_ONLY_SUITE
