"""``vmferry bench``: measures vmferry on this computer, beside what it competes with."""

from __future__ import annotations

import asyncio
import json as json_module
import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from google.protobuf.json_format import ParseDict, ParseError

from vmferry.bench import compare as comparison
from vmferry.bench import transport as yardstick
from vmferry.bench.compare import DEFAULT_DOWNTIME_LIMIT_MS, DEFAULT_RUNS, Result, Row, facts
from vmferry.bench.contents import Contents
from vmferry.bench.figures import Crossing, document
from vmferry.bench.guest import Load, Wishes
from vmferry.bench.peer import VARIANTS
from vmferry.bench.table import make_table, others, sentence
from vmferry.bench.transport import Pumping
from vmferry.cli.demo import until_signalled
from vmferry.cli.output import JsonOption, console, print_document, say
from vmferry.errors import ExitCode, InvalidArgumentError
from vmferry.v1.migration_pb2 import MigrationOptions

app = typer.Typer(help="Measure vmferry on this computer.", no_args_is_help=True)

DEFAULT_FILES_MIB: Final = 300
DEFAULT_RATE: Final = 50
DEFAULT_SET_MIB: Final = 64


AgainstOption = Annotated[
    list[str] | None,
    typer.Option("--against", help=f"Repeatable: {', '.join(VARIANTS)}; default: qemu-tls."),
]
ResidentOption = Annotated[
    int | None,
    typer.Option("--resident-mib", min=0, help="Random content; default: 1100, with files 0."),
]
FilesOption = Annotated[int, typer.Option("--files-mib", min=1, help="Real files, with --guest files.")]
RateOption = Annotated[
    int, typer.Option("--dirty-mib-per-s", min=1, help="How fast it writes, with --guest writer.")
]
SetOption = Annotated[
    int, typer.Option("--working-set-mib", min=1, help="What it writes to again and again.")
]
RunsOption = Annotated[int, typer.Option("--runs", min=1, help="Migrations of each, in turn.")]
LinkOption = Annotated[
    int | None, typer.Option("--link-mbit", min=1, help="Over a link of so many Mbit/s; needs root.")
]
DowntimeOption = Annotated[int, typer.Option("--downtime-limit-ms", min=1, help="For all of them.")]
LimitOption = Annotated[
    int, typer.Option("--limit-s", min=0, help="When a migration is given up; 0: by link and guest.")
]
MigrationOption = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Field of MigrationOptions, for ours; repeatable."),
]

PreallocateOption = Annotated[
    bool,
    typer.Option(
        "--preallocate/--no-preallocate",
        help="Whether destinations have all memory taken beforehand; ours by ready_memory_mib.",
    ),
]
HugePagesOption = Annotated[
    bool | None,
    typer.Option(
        "--huge-pages/--small-pages",
        help="Whether guests, of all alike, have memory in huge pages; default: if root may mount it.",
    ),
]


@app.callback()
def bench() -> None:
    """Measure vmferry on this computer."""


@app.command()
def compare(
    *,
    against: AgainstOption = None,
    ours_only: Annotated[bool, typer.Option("--ours-only", help="Measure without any peer.")] = False,
    guest: Annotated[Load, typer.Option("--guest", help="What it does.")] = Load.IDLE,
    memory_mib: Annotated[int, typer.Option("--memory-mib", min=64, help="Guest memory.")] = 2048,
    resident_mib: ResidentOption = None,
    files_mib: FilesOption = DEFAULT_FILES_MIB,
    dirty_mib_per_s: RateOption = DEFAULT_RATE,
    working_set_mib: SetOption = DEFAULT_SET_MIB,
    runs: RunsOption = DEFAULT_RUNS,
    link_mbit: LinkOption = None,
    downtime_limit_ms: DowntimeOption = DEFAULT_DOWNTIME_LIMIT_MS,
    limit_s: LimitOption = 0,
    preallocate: PreallocateOption = True,
    huge_pages: HugePagesOption = None,
    option: MigrationOption = None,
    accelerator: Annotated[str, typer.Option("--accelerator", help="auto, kvm or tcg, for all.")] = "auto",
    kernel: Annotated[Path | None, typer.Option("--kernel", metavar="PATH", help="Of the guest.")] = None,
    json: JsonOption = False,
) -> None:
    """Move the same guest by vmferry and by QEMU itself, in turn, and compare medians."""
    wishes = Wishes(
        load=guest,
        memory_mib=memory_mib,
        resident_mib=_resident(guest, resident_mib),
        files_mib=files_mib if guest is Load.FILES else 0,
        rate_mib_per_s=dirty_mib_per_s if guest is Load.WRITER else 0,
        set_mib=working_set_mib if guest is Load.WRITER else 0,
        kernel=kernel,
    )
    row = Row(
        wishes,
        peers=() if ours_only else tuple(dict.fromkeys(against or ["qemu-tls"])),
        link_mbit=link_mbit,
        runs=runs,
        downtime_limit_ms=downtime_limit_ms,
        limit_s=limit_s,
        accelerator=accelerator,
        preallocated=preallocate,
        huge_pages=huge_pages,
        options=parse_options(option or []),
    )
    raise typer.Exit(show([row], as_json=json, one=True))


def show(rows: list[Row], *, as_json: bool, one: bool = False) -> ExitCode:
    """Measure rows and print them; the exit code says whether all of ours were right.

    Args:
        rows: what to compare.
        as_json: one document instead of tables.
        one: the document is the only row itself instead of a list.
    """
    for row in rows:
        row.check()
    before = os.getloadavg()
    results = asyncio.run(until_signalled(_measure(rows)))
    machine = facts(rows[0].accelerator) | {"load_before": before, "load_after": os.getloadavg()}
    if as_json:
        documents = [described(result) for result in results]
        print_document({"machine": machine} | (documents[0] if one else {"rows": documents}))
    else:
        _print(results, machine)
    right = all(
        crossing.counts for result in results for crossing in result.crossings if crossing.who == "ours"
    )
    return ExitCode.OK if right else ExitCode.FAILED


def described(result: Result) -> dict[str, Any]:
    """The document of a row."""
    row = result.row
    return {
        "guest": row.wishes.name,
        "load": row.wishes.load.value,
        "memory_mib": row.wishes.memory_mib,
        "resident_mib": row.wishes.resident_mib,
        "files_mib": row.wishes.files_mib,
        "dirty_mib_per_s": row.wishes.rate_mib_per_s,
        "working_set_mib": row.wishes.set_mib,
        "network": result.network,
        "link_mbit": row.link_mbit,
        "wire_counts_others": result.counts_others,
        "runs": row.runs,
        "downtime_limit_ms": row.downtime_limit_ms,
        "preallocated": row.preallocated,
        "huge_pages": result.huge_pages,
        "limit_s": row.patience_s,
    } | document(result.crossings, row.peers)


def parse_options(texts: list[str]) -> MigrationOptions:
    """Fields of a migration's options, as the API spells them in JSON.

    Raises:
        InvalidArgumentError: there is no such field, or the value does not suit it.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidArgumentError(f"{text!r} is not NAME=VALUE", field="--option")
        try:
            values[name] = json_module.loads(value)
        except ValueError:
            values[name] = value
    try:
        return ParseDict(values, MigrationOptions())
    except ParseError as error:
        raise InvalidArgumentError(str(error), field="--option") from error


async def _measure(rows: list[Row]) -> list[Result]:
    results = []
    for row in rows:
        where = f"{row.link_mbit} Mbit/s" if row.link_mbit else "loopback"
        say(f"{row.wishes.name}; {where}; {row.runs} runs")
        results.append(await comparison.compare(row, _tell))
    return results


def _tell(crossing: Crossing) -> None:
    say(sentence(crossing))


def _resident(guest: Load, resident_mib: int | None) -> int:
    if resident_mib is not None:
        return resident_mib
    return 0 if guest is Load.FILES else Wishes.resident_mib


def _print(results: list[Result], machine: dict[str, Any]) -> None:
    screen = console(stderr=False)
    print(
        f"Linux {machine['kernel']}, {machine['cores']} cores ({machine['processor']}), QEMU {machine['qemu']}; "
        f"load {machine['load_before'][0]:.2f} before, {machine['load_after'][0]:.2f} after\n"
        "median (min-max) of the migrations that were right; ÷ ours above 1 speaks for vmferry\n"
    )
    for result in results:
        row = result.row
        title = f"{row.wishes.name}; {result.network}; downtime limit {row.downtime_limit_ms} ms"
        screen.print(make_table(title, result.crossings, row.peers))
        peaks = [crossing.services_peak_mib for crossing in result.crossings if crossing.services_peak_mib]
        if peaks:
            print(f"most memory of one of our services: {max(peaks):.0f} MiB")
        for text in others(result.crossings):
            print(text)
        print()


@app.command()
def transport(
    *,
    mib: Annotated[int, typer.Option("--mib", min=16, help="Pumped, and held by the guest.")] = 1024,
    runs: RunsOption = DEFAULT_RUNS,
    lanes: Annotated[int, typer.Option("--lanes", min=0, max=16, help="0: as configured.")] = 0,
    contents: Annotated[Contents, typer.Option("--contents", help="What the pages hold.")] = Contents.RANDOM,
    compression: Annotated[
        str, typer.Option("--compression", help="Of the migration; the pump sends pages as they are.")
    ] = "none",
    link_mbit: LinkOption = None,
    huge_pages: HugePagesOption = None,
    migrate: Annotated[
        bool, typer.Option("--migrate/--pump-only", help="Migrate a micro-VM that holds as much, in turn.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Pump pages over the lanes of a migration, with no guest, and migrate as many, in turn."""
    pumping = Pumping(
        mib, runs, lanes, contents.value, compression, link_mbit, huge_pages=huge_pages, migrate=migrate
    )
    before = os.getloadavg()
    found = asyncio.run(until_signalled(yardstick.measure(pumping)))
    machine = facts("tcg") | {"load_before": before, "load_after": os.getloadavg()}
    if json:
        print_document({"machine": machine} | yardstick.document(pumping, found))
        return
    for title, rates in (("bare transport", found.pump), ("migration", found.migration)):
        if rates:
            rate, cpu = yardstick.spreads(rates).values()
            print(
                f"{title:<15} {rate.median:8.1f} MB/s ({rate.min:.1f}-{rate.max:.1f}), "
                f"{cpu.median:.2f} s of processor time for each GiB"
            )
    if found.migration:
        print(f"{'ratio':<15} {yardstick.ratio(found):8.3f}")
