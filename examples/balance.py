"""A scheduler that reacts to load: it moves machines from the busier of some hosts to the calmer ones.

Try it on two hosts on this computer, in three terminals:

    make playground
    for n in 1 2; do .venv/bin/vmferry machine run --config playground/host-a.toml --name busy-$n \
        --program writer --memory-mib 32 --param dirty-mib-per-s=20 --param working-set-mib=4; done
    .venv/bin/python examples/balance.py

What a guest does is not visible from outside, but how fast it writes its memory is, and every plan measures that. A
host's load is what all its guests write. A machine moves if that makes the busiest host calmer by enough, and if the
report says that it can; nothing else is assumed about hosts or machines. A machine that just moved is left alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.client import SourceClient, Target
from vmferry.errors import VmferryError
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

MIB = 1024 * 1024
PLAYGROUND = (
    "a=spiffe://demo.vmferry.example/vmhost/a,127.0.0.1:7601,127.0.0.1:7602",
    "b=spiffe://demo.vmferry.example/vmhost/b,127.0.0.1:7611,127.0.0.1:7612",
)

Loads = Mapping[str, Mapping[str, float]]
"""By host and machine: what it writes, in bytes per second."""


@dataclass(frozen=True)
class Move:
    """What is to be done."""

    machine: str
    source: str
    destination: str


def choose(loads: Loads, *, least_gain: float) -> Move | None:
    """The move that makes the busiest host calmest, if it gains enough; the same loads give the same answer."""
    totals = {host: sum(machines.values()) for host, machines in loads.items()}
    busiest = max(totals, key=lambda host: (totals[host], host))
    best: tuple[float, str, str] | None = None
    for machine, rate in loads[busiest].items():
        for host, total in totals.items():
            gain = totals[busiest] - max(totals[busiest] - rate, total + rate)
            if host != busiest and gain >= least_gain and (best is None or (gain, machine, host) > best):
                best = gain, machine, host
    return Move(best[1], busiest, best[2]) if best else None


class Balancer:
    """Connections to all hosts, and what was done lately."""

    def __init__(
        self, hosts: Mapping[str, SourceClient], targets: Mapping[str, Target], rest_s: float
    ) -> None:
        self._hosts = hosts
        self._targets = targets
        self._rest_s = rest_s
        self._moved_at: dict[str, float] = {}

    async def loads(self) -> dict[str, dict[str, float]]:
        """What the machines that could move now write."""
        return {name: await self._load(name) for name in self._hosts}

    async def _load(self, name: str) -> dict[str, float]:
        found = {}
        elsewhere = next(target for other, target in self._targets.items() if other != name)
        for machine in await self._hosts[name].list_machines():
            if machine.right != machine_pb2.MACHINE_RIGHT_OWNED or machine.migration_id:
                continue
            if time.monotonic() - self._moved_at.get(machine.uuid, -self._rest_s) < self._rest_s:
                continue
            report = await self._hosts[name].plan(machine.uuid, elsewhere)
            if report.compatible and report.HasField("prediction"):
                found[machine.uuid] = report.prediction.dirty_bytes_per_second
        return found

    async def move(self, move: Move) -> None:
        """Move a machine, and say how it went."""
        migration = await self._hosts[move.source].migrate(move.machine, self._targets[move.destination])
        self._moved_at[move.machine] = time.monotonic()
        outcome = pb.MigrationOutcome.Name(migration.outcome).removeprefix("MIGRATION_OUTCOME_").lower()
        where = f"{move.source} to {move.destination}"
        if migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED:
            pause_ms = migration.downtime.ToMilliseconds()
            print(f"{migration.machine}: {where}, paused for {pause_ms} ms", flush=True)
        else:
            print(f"{migration.machine}: {where} {outcome}: {migration.reason.message}", flush=True)


async def run(
    places: Sequence[str], tls: Path, *, rounds: int, interval_s: float, least_gain: float, rest_s: float
) -> None:
    """Look and move again and again; for ever, if no number of rounds is given."""
    async with contextlib.AsyncExitStack() as stack:
        hosts, targets = {}, {}
        for place in places:
            name, _, rest = place.partition("=")
            identity, source, destination = rest.split(",")
            hosts[name] = await stack.enter_async_context(SourceClient.open(source, identity, tls))
            targets[name] = Target(identity, destination)
        balancer = Balancer(hosts, targets, rest_s)
        done = 0
        while done < rounds or not rounds:
            done += 1
            try:
                loads = await balancer.loads()
                shown = ", ".join(
                    f"{host} {sum(one.values()) / MIB:.1f} MiB/s" for host, one in loads.items()
                )
                print(f"load: {shown}", flush=True)
                move = choose(loads, least_gain=least_gain)
                if move is not None:
                    await balancer.move(move)
            except (
                VmferryError
            ) as error:  # a host that is away, or refuses, is no reason to give up the others
                print(f"{error.reason}: {error.message}", flush=True)
            if done != rounds:
                await asyncio.sleep(interval_s)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Moves machines from busier hosts to calmer ones.")
    parser.add_argument(
        "--host",
        action="append",
        metavar="NAME=IDENTITY,SOURCE,DESTINATION",
        help="a host, and where its services listen; by default those of make playground",
    )
    parser.add_argument("--tls", type=Path, default=Path("playground/tls/operator"))
    parser.add_argument("--rounds", type=int, default=0, help="how often to look; 0: for ever")
    parser.add_argument("--interval-s", type=float, default=5.0)
    parser.add_argument("--least-gain-mib-per-s", type=float, default=5.0, help="what a move must be worth")
    parser.add_argument("--rest-s", type=float, default=60.0, help="how long a machine is left alone")
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(
            run(
                given.host or PLAYGROUND,
                given.tls,
                rounds=given.rounds,
                interval_s=given.interval_s,
                least_gain=given.least_gain_mib_per_s * MIB,
                rest_s=given.rest_s,
            )
        )


if __name__ == "__main__":
    main()
