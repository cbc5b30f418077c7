"""Plans for hosts that need not exist."""

from __future__ import annotations

from hypothesis import strategies as st

from vmferry.fleet.plan import HostPlan, Plan, SetPlan, UpdatePlan


def host(name: str, update_domain: int, fault_domain: int = 0) -> HostPlan:
    """A host that need not exist."""
    return HostPlan(
        name, f"spiffe://t.example/vmhost/{name}", f"{name}:1", f"{name}:2", update_domain, fault_domain
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Up to nine hosts in up to four update domains, with availability sets across them."""
    hosts = [
        host(f"h{number}", draw(st.integers(0, 3)), draw(st.integers(0, 1)))
        for number in range(draw(st.integers(1, 9)))
    ]
    names = st.lists(st.sampled_from([one.name for one in hosts]), min_size=2, unique=True)
    found = draw(st.lists(names, max_size=4)) if len(hosts) > 1 else []
    domains = {one.name: one.update_domain for one in hosts}
    sets = [
        SetPlan(f"s{number}", tuple(members))
        for number, members in enumerate(found)
        if len({domains[name] for name in members}) > 1
    ]
    plan = Plan(
        tuple(hosts),
        tuple(sets),
        update=UpdatePlan(parallel=draw(st.integers(1, 3)), command=("true",), in_place=draw(st.booleans())),
    )
    plan.validate()
    return plan
