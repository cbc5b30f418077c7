"""How long an update in place pauses a QEMU guest, by the size of its memory: ``python benchmarks/update.py``.

Promise: every figure is that of ``vmferry demo --update --machine qemu``, with journals, certificates and all;
nothing is left out. The guest fills the same few MiB whatever its size: memory that is never touched takes no part
in anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

DEFAULT_SIZES_MIB = (1024, 4096, 8192)
RESIDENT_MIB = 32


def main() -> int:
    """Measure each size, and print a table or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-mib", type=int, nargs="+", default=DEFAULT_SIZES_MIB)
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--machine", choices=("qemu", "microvm"), default="qemu")
    parser.add_argument("--qemu-binary", default="", help="the QEMU that takes over; default: the same one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = [measured(arguments, size) for size in arguments.memory_mib]
    if arguments.json:
        print(json.dumps(found))
        return 0
    print(
        "| memory | pause, median of all | shortest | longest | copied | outcome |\n|---|---|---|---|---|---|"
    )
    for one in found:
        print(
            f"| {one['memory_mib']} MiB | {one['median_ms']:.1f} ms | {one['min_ms']:.1f} ms | "
            f"{one['max_ms']:.1f} ms | {one['bytes_copied']} | {one['outcome']} |"
        )
    return 0


def measured(arguments: argparse.Namespace, memory_mib: int) -> dict[str, object]:
    """One guest of this size, updated again and again."""
    command = [
        *(sys.executable, "-m", "vmferry.cli.main", "demo", "--update", "--json"),
        *("--machine", arguments.machine, "--memory-mib", str(memory_mib)),
        *("--resident-mib", str(RESIDENT_MIB), "--repeat", str(arguments.repeat)),
        *(("--qemu-binary", arguments.qemu_binary) if arguments.qemu_binary else ()),
    ]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    document = json.loads(told.stdout)
    pauses = [one["pause_ms"] for one in document["updates"]]
    return {
        "memory_mib": memory_mib,
        "median_ms": statistics.median(pauses),
        "min_ms": min(pauses),
        "max_ms": max(pauses),
        "pauses_ms": pauses,
        "bytes_copied": document["bytes_copied"],
        "outcome": document["outcome"],
        "old_version": document["old_version"],
        "new_version": document["new_version"],
    }


if __name__ == "__main__":
    sys.exit(main())
