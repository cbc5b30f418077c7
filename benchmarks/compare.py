"""Ours and QEMU's own migration in turn, over several guests and links: ``make bench``.

Without arguments a selection in which every guest, link and peer occurs, about half an hour on a quiet computer;
``--all`` is each with every other, and takes an hour with ``--runs 3``. What the columns mean, and what cannot be
compared, stands in docs/benchmarks.md.

    python -m benchmarks.compare [--all] [--guest NAME] [--scenario NAME] [--against NAME] [--runs N] [--json] ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmferry.cli.output import say_error
from vmferry.errors import VmferryError
from vmferry.security.tls13 import enforce_tls13

if TYPE_CHECKING:
    from vmferry.bench.compare import Row

SCENARIOS = {"loopback": None, "1gbit": 1000, "100mbit": 100}
GUESTS = ("idle", "files", "writer-50", "writer-200", "writer-500")
PEERS = ("qemu", "qemu-tls", "qemu-multifd-tls", "qemu-multifd-zstd-tls")
DEFAULT = (
    ("loopback", "idle", PEERS),
    ("loopback", "files", ("qemu-tls",)),
    ("loopback", "writer-50", ("qemu-tls",)),
    ("loopback", "writer-200", ("qemu-tls",)),
    ("loopback", "writer-500", ("qemu-tls",)),
    ("1gbit", "idle", ("qemu-tls",)),
    ("1gbit", "files", ("qemu-tls", "qemu-multifd-zstd-tls")),
    ("100mbit", "idle", ("qemu-tls",)),
    ("100mbit", "files", ("qemu-tls", "qemu-multifd-zstd-tls")),
)
"""What is compared unless something else is named."""
MEMORY_MIB = 2048
RESIDENT_MIB = {"loopback": 1100, "1gbit": 512, "100mbit": 96}
"""Less over slow links, where as much would only take longer."""
SET_MIB = 64
FILES_MIB = 300


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="make bench", description="Compare with QEMU's own migration, in turn."
    )
    parser.add_argument("--all", action="store_true", help="every guest over every link against every peer")
    parser.add_argument(
        "--scenario", action="append", choices=SCENARIOS, help="only over this link; repeatable"
    )
    parser.add_argument("--guest", action="append", choices=GUESTS, help="only with this guest; repeatable")
    parser.add_argument("--against", action="append", choices=PEERS, help="only against this; repeatable")
    parser.add_argument("--ours-only", action="store_true", help="measure without any peer")
    parser.add_argument("--runs", type=int, default=5, help="migrations of each")
    parser.add_argument("--memory-mib", type=int, default=MEMORY_MIB, help="guest memory")
    parser.add_argument("--resident-mib", type=int, help="random content of guests that do not hold files")
    parser.add_argument("--files-mib", type=int, default=FILES_MIB, help="files that guests with files hold")
    parser.add_argument("--working-set-mib", type=int, default=SET_MIB, help="what writers go over")
    parser.add_argument("--no-preallocate", action="store_true", help="destinations take memory meanwhile")
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        default=None,
        help="guest memory in huge pages; default: if root may mount it",
    )
    parser.add_argument(
        "--small-pages", dest="huge_pages", action="store_false", help="guest memory as /dev/shm has it"
    )
    parser.add_argument("--limit-s", type=int, default=0, help="when a migration is given up")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for ours; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document with every migration")
    return parser.parse_args(words)


def selection(asked: argparse.Namespace) -> list[tuple[str, str, tuple[str, ...]]]:
    """Links, guests and peers."""
    if not (asked.all or asked.scenario or asked.guest):
        chosen = list(DEFAULT)
    else:
        scenarios = asked.scenario or (tuple(SCENARIOS) if asked.all else ("loopback",))
        guests = asked.guest or (GUESTS if asked.all else ("idle",))
        chosen = [(scenario, guest, PEERS) for scenario in scenarios for guest in guests]
    if asked.ours_only:
        return [(scenario, guest, ()) for scenario, guest, _ in chosen]
    if asked.against:
        return [(scenario, guest, tuple(asked.against)) for scenario, guest, _ in chosen]
    return chosen


def row(asked: argparse.Namespace, scenario: str, guest: str, peers: tuple[str, ...]) -> Row:
    """What is to be compared over one link with one guest."""
    from vmferry.bench.compare import Row  # noqa: PLC0415 - loads grpc, which must find TLS 1.2 shut out
    from vmferry.bench.guest import Load, Wishes  # noqa: PLC0415
    from vmferry.cli.bench import parse_options  # noqa: PLC0415

    load, _, rate = guest.partition("-")
    resident = asked.resident_mib
    if resident is None:
        resident = RESIDENT_MIB[scenario]
    wishes = Wishes(
        load=Load(load),
        memory_mib=asked.memory_mib,
        resident_mib=0 if load == Load.FILES else resident,
        files_mib=asked.files_mib if load == Load.FILES else 0,
        rate_mib_per_s=int(rate or 0),
        set_mib=asked.working_set_mib if load == Load.WRITER else 0,
    )
    return Row(
        wishes,
        peers=peers,
        link_mbit=SCENARIOS[scenario],
        runs=asked.runs,
        limit_s=asked.limit_s,
        preallocated=not asked.no_preallocate,
        huge_pages=asked.huge_pages,
        options=parse_options(asked.option),
    )


def main() -> int:
    """Measure, and print."""
    asked = arguments()
    enforce_tls13()
    from vmferry.cli.bench import show  # noqa: PLC0415 - loads grpc, which must find TLS 1.2 shut out

    try:
        return show([row(asked, *chosen) for chosen in selection(asked)], as_json=asked.json)
    except VmferryError as error:
        say_error(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
