"""``vmferry fleet update``: the hosts of a plan, one update domain at a time.

Promise: a dry run changes nothing. A run that ends before its time, however it ends, is gone on with by the same
command; the exit code is 0 only if every host of the plan is done.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from vmferry.cli.connection import TlsOption
from vmferry.cli.output import JsonOption, print_document, say
from vmferry.errors import ConfigError, ExitCode, VmferryError
from vmferry.fleet import rollout
from vmferry.fleet.executing import Update
from vmferry.fleet.hosts import RealHosts, Resident
from vmferry.fleet.journal import Journal, read
from vmferry.fleet.plan import Plan
from vmferry.fleet.rollout import Progress, Stage
from vmferry.fleet.ways import Obstacle, Way, way

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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the order, and which way each machine goes."),
    ] = False,
    json: JsonOption = False,
    tls: TlsOption,
) -> None:
    """Update the hosts of a plan, one update domain at a time; halt at the first that is not healthy."""
    whole = _load(plan)
    path = journal or plan.with_suffix(".journal")
    if dry_run:
        progress, _ = read(path, whole)
        ways = asyncio.run(_ways(whole, progress, RealHosts(whole, tls)))
        _print_order(whole, progress, ways, json=json)
        return
    with Journal(path, whole) as opened:
        why = asyncio.run(Update(whole, opened, RealHosts(whole, tls), say).run())
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


@dataclass(frozen=True)
class _Ways:
    """Which way each machine of a host would go now."""

    machines: list[tuple[Resident, Way]] = field(default_factory=list)
    problem: str = ""
    """Why that cannot be said."""


async def _ways(plan: Plan, progress: Progress, hosts: RealHosts) -> dict[str, _Ways]:
    """Ask every host that is not done about every machine; changes nothing."""
    asked = [host.name for host in plan.hosts if progress.of(host.name).stage is not Stage.DONE]
    found = await asyncio.gather(*(_ways_of(plan, progress, hosts, name) for name in asked))
    return dict(zip(asked, found, strict=True))


async def _ways_of(plan: Plan, progress: Progress, hosts: RealHosts, name: str) -> _Ways:
    commanded = progress.of(name).updated
    try:
        return _Ways(
            [
                (one, way(plan, await _obstacles(plan, hosts, name, one), commanded=commanded))
                for one in await hosts.machines(name)
            ]
        )
    except VmferryError as error:
        return _Ways(problem=f"{name} cannot be asked: {error}")


async def _obstacles(plan: Plan, hosts: RealHosts, name: str, one: Resident) -> list[Obstacle]:
    return await hosts.obstacles_now(name, one.id) if plan.in_place else []


def _print_order(plan: Plan, progress: Progress, ways: dict[str, _Ways], *, json: bool) -> None:
    if json:
        print_document(_document(plan, progress, "", ways))
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
                print(f"    machines that leave may go to {to}")
                _print_ways(ways[host.name])


def _print_ways(found: _Ways) -> None:
    if found.problem:
        print(f"    {found.problem}")
    for machine, chosen in found.machines:
        word = "is updated in place" if chosen.in_place else "leaves and comes back"
        print(f"    {machine.name} {word}: {chosen.why}")


def _document(
    plan: Plan, progress: Progress, why: str, ways: dict[str, _Ways] | None = None
) -> dict[str, object]:
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
                        **_ways_document(ways, host.name),
                    }
                    for host in domain
                ],
            }
            for domain in plan.order
        ],
    }


def _ways_document(ways: dict[str, _Ways] | None, name: str) -> dict[str, object]:
    found = (ways or {}).get(name)
    if found is None:
        return {}
    return {
        "problem": found.problem,
        "machines": [
            {"name": one.name, "id": one.id, "in_place": chosen.in_place, "why": chosen.why}
            for one, chosen in found.machines
        ],
    }
