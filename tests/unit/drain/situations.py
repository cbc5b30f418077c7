"""Situations of a drain: machines, what hosts say of them, and the facts that a planner is given."""

from __future__ import annotations

from dataclasses import replace

from vmferry.drain.planner import Facts, Machine, Prospect, Standing

GIB = 1 << 30
NOW = 1_000_000.0


def machine(name: str, cost_s: float = 1.0, gib: int = 1, standing: Standing = Standing.READY) -> Machine:
    return Machine(name, standing, gib * GIB, cost_s)


def prospect(gib: int = 100, **changes: object) -> Prospect:
    return replace(Prospect(compatible=True, room_bytes=gib * GIB, asked_at_s=NOW - 1), **changes)  # type: ignore[arg-type]


def facts(machines: list[Machine], hosts: tuple[str, ...] = ("b", "c"), **changes: object) -> Facts:
    """All compatible everywhere, and freshly asked, unless it is said otherwise."""
    prospects = {(one.id, host): prospect() for one in machines for host in hosts}
    found = Facts(machines, hosts, prospects, now_s=NOW, room=2, rest_s=30.0, fresh_s=15.0)
    return replace(found, **changes)  # type: ignore[arg-type]
