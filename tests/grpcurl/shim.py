"""Stands in for ``grpcurl``: takes its command line, has ``buf curl`` make the call, and notes what came of it.

Only what docs/grpcurl.md uses is understood; anything else fails. For each call one line of JSON is appended to the
file that CALLS names: the method, and the reason it was refused for (empty if it was answered).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from typing import Any

from google.rpc.error_details_pb2 import ErrorInfo

LIMIT_S = 30.0
_SAME = {
    "-cacert": "--cacert",
    "-cert": "--cert",
    "-key": "--key",
    "-servername": "--servername",
    "-d": "--data",
}


def main() -> int:
    """Make the call; returns grpcurl's exit code."""
    options, limit_s, unix = [], LIMIT_S, ""
    arguments = iter(sys.argv[1:])
    plain: list[str] = []
    for argument in arguments:
        if argument in _SAME:
            options += [_SAME[argument], next(arguments)]
        elif argument == "-max-time":
            limit_s = float(next(arguments))
        elif argument in ("-plaintext", "-unix"):
            unix = argument
        else:
            assert not argument.startswith("-"), f"the shim does not know {argument}"
            plain.append(argument)
    address, method = plain
    if unix:
        options += ["--unix-socket", address, "--http2-prior-knowledge"]
        url = "http://localhost"
    else:
        url = f"https://{address}"
    options += ["--list-services", url] if method == "list" else [f"{url}/{method}"]
    code, reason = _call(["curl", "--protocol", "grpc", "--reflect", *options], limit_s)
    with open(os.environ["CALLS"], "a", encoding="utf-8") as file:  # noqa: PTH123 - as plain as a shell would
        file.write(json.dumps({"method": method, "refused": reason}) + "\n")
    return code


def _call(command: list[str], limit_s: float) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [os.environ["BUF"], *command], capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        sys.stdout.buffer.write(error.stdout or b"")
        return 1, "DEADLINE_EXCEEDED" if error.stdout else "SILENCE"
    sys.stdout.buffer.write(done.stdout)
    sys.stderr.buffer.write(done.stderr)
    return done.returncode, _reason(done.stderr.decode()) if done.returncode else ""


def _reason(said: str) -> str:
    """The reason of our catalogue in buf's answer; what else it said, if there is none."""
    try:
        error: dict[str, Any] = json.loads(said)
    except ValueError:
        return said.strip()
    for detail in error.get("details", ()):
        if detail["type"] == "google.rpc.ErrorInfo":
            return ErrorInfo.FromString(base64.b64decode(detail["value"] + "==")).reason
    return f"{error.get('code')}: {error.get('message')}"


if __name__ == "__main__":
    sys.exit(main())
