"""``vmferry fleet update``: the hosts of a plan, one update domain at a time.

Promise: a run that ends before its time, however it ends, is gone on with by the same command; the exit code is 0
only if every host of the plan is done.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from vmferry.cli.connection import TlsOption
from vmferry.cli.output import JsonOption, print_document, say
from vmferry.errors import ConfigError, ExitCode
from vmferry.fleet import rollout
from vmferry.fleet.executing import Update
from vmferry.fleet.journal import Journal, read
from vmferry.fleet.plan import Plan
from vmferry.fleet.rollout import Progress, Stage

app = typer.Typer(no_args_is_help=True, help="Update many hosts.")


@app.callback()
def fleet() -> None:
    """Update many hosts."""


@app.command()
def update(
    *,
    plan: Annotated[Path, typer.Option("--plan", metavar="FILE", help="What is to be done (TOML).")],
    journal: Annotated[
        Path | None,
        typer.Option("--journal", metavar="FILE", help="How far it has come; beside the plan if not given."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the order, and do nothing.")] = False,
    json: JsonOption = False,
    tls: TlsOption,
) -> None:
    """Update the hosts of a plan, one update domain at a time; halt at the first that is not healthy."""
    whole = _load(plan)
    path = journal or plan.with_suffix(".journal")
    if dry_run:
        progress, _ = read(path, whole)
        _print_order(whole, progress, json=json)
        return
    with Journal(path, whole) as opened:
        why = asyncio.run(Update(whole, opened, tls, say).run())
        progress = opened.progress
    if json:
        print_document(_document(whole, progress, why))
    elif why:
        say(f"halted: {why}")
        say(f"  remedy: Mend it, and run the same command again; it goes on by {path}.")
    else:
        say("every host is done")
    if why:
        raise typer.Exit(ExitCode.FAILED)


def _load(path: Path) -> Plan:
    try:
        return Plan.from_toml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field="--plan") from error


def _print_order(plan: Plan, progress: Progress, *, json: bool) -> None:
    if json:
        print_document(_document(plan, progress, ""))
        return
    for domain in plan.order:
        print(f"update domain {domain[0].update_domain}")
        for host in domain:
            one = progress.of(host.name)
            sets = ", ".join(sorted(plan.sets_of(host.name))) or "none"
            print(
                f"  {host.name}: {one.stage.value}, fault domain {host.fault_domain}, availability sets: {sets}"
            )
            if one.stage is not Stage.DONE:
                to = (
                    ", ".join(rollout.targets(plan, progress, host.name))
                    or "nowhere: no host outside of its domain is up"
                )
                print(f"    its machines may go to {to}")


def _document(plan: Plan, progress: Progress, why: str) -> dict[str, object]:
    return {
        "halted": why,
        "finished": rollout.finished(plan, progress),
        "order": [
            {
                "update_domain": domain[0].update_domain,
                "hosts": [
                    {
                        "name": host.name,
                        "fault_domain": host.fault_domain,
                        "stage": progress.of(host.name).stage.value,
                        "away": {name: away.target for name, away in progress.of(host.name).away.items()},
                        "note": progress.of(host.name).note,
                    }
                    for host in domain
                ],
            }
            for domain in plan.order
        ],
    }
