"""The order of a fleet's update, over random plans, failures, and runs that are killed anywhere."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fleet.fleet_plans import plans
from vmferry.errors import ConfigError
from vmferry.fleet import rollout
from vmferry.fleet.journal import Journal, read
from vmferry.fleet.plan import Plan
from vmferry.fleet.rollout import Entry, InvalidEntryError, Kind, Progress, Stage


def steps_of(one: rollout.HostProgress, name: str) -> list[Entry]:
    """What may happen next at a host that is being updated, failures included."""
    after = [Entry(name, Kind.FAILED, note="random")]
    if not one.empty:
        stays = Entry(name, Kind.STAYS, f"s{len(one.stays)}")
        return [*after, Entry(name, Kind.LEAVING, f"m{len(one.away)}"), stays, Entry(name, Kind.EMPTY)]
    if not one.updated:
        return [*after, Entry(name, Kind.UPDATED)]
    if one.stays:
        kinds = (Kind.RENEWING, Kind.RENEWED, Kind.LEAVING)
        return [
            *after,
            *(Entry(name, kind, machine, request_id="r") for machine in one.stays for kind in kinds),
        ]
    back = [Entry(name, Kind.RETURNED, machine) for machine in one.away]
    return [*after, *(back or [Entry(name, Kind.DONE)])]


def assert_safe(plan: Plan, progress: Progress) -> None:
    """Never two domains of one availability set, nor of the fleet, are down at once; never more than allowed."""
    down = {name: plan.host(name).update_domain for name in progress.down}
    for one in plan.sets:
        assert len({down[name] for name in one.hosts if name in down}) <= 1, one
        up = [name for name in one.hosts if name not in down]
        assert up, f"nothing of {one} is up"
    assert len(set(down.values())) <= 1
    assert len(down) <= plan.update.parallel
    for name in down:
        earlier = [other for other in plan.hosts if other.update_domain < plan.host(name).update_domain]
        assert all(progress.of(other.name).stage is Stage.DONE for other in earlier)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(plans(), st.integers(0, 2**32))
def test_never_two_domains_of_a_set_are_down_at_once(plan: Plan, seed: int) -> None:
    """Whatever fails, in whatever order steps end, and wherever the run is killed and begun again.

    It comes to its end all the same, if failures are mended.
    """
    choose = random.Random(seed)
    journal: list[Entry] = []
    progress = Progress()
    for _ in range(2000):
        assert_safe(plan, progress)
        if rollout.finished(plan, progress):
            return
        if choose.random() < 0.1:  # killed, and run again
            assert rollout.folded(journal) == progress
            for name in progress.failed:
                journal.append(Entry(name, Kind.RETRIED))
                progress = rollout.evolve(progress, journal[-1])
        may = rollout.may_begin(plan, progress)
        assert not (may and progress.failed), "something begins although a host has failed"
        options = [Entry(name, Kind.BEGUN) for name in may[:1]]
        for name in progress.down:
            if progress.of(name).stage is Stage.UPDATING:
                steps = steps_of(progress.of(name), name)
                options += steps[:1] if choose.random() < 0.1 else steps[1:]
        if options:
            journal.append(choose.choice(options))
            progress = rollout.evolve(progress, journal[-1])
        else:
            assert progress.failed, "it stands still, and nothing has failed"
    pytest.fail("it did not come to its end")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(plans())
def test_machines_go_only_to_hosts_that_are_up_and_in_another_domain(plan: Plan) -> None:
    """Rather to one without machines of the same availability set."""
    progress = Progress()
    for name in rollout.may_begin(plan, progress):
        progress = rollout.evolve(progress, Entry(name, Kind.BEGUN))
    for name in progress.down:
        found = rollout.targets(plan, progress, name)
        assert not set(found) & set(progress.down)
        assert all(plan.host(other).update_domain != plan.host(name).update_domain for other in found)
        shares = [bool(plan.sets_of(other) & plan.sets_of(name)) for other in found]
        assert shares == sorted(shares)


@pytest.mark.parametrize(
    ("entries", "wrong"),
    [
        ([], Kind.DONE),
        ([], Kind.RETRIED),
        ([Kind.BEGUN], Kind.BEGUN),
        ([Kind.BEGUN, Kind.FAILED], Kind.DONE),
        ([Kind.BEGUN, Kind.DONE], Kind.FAILED),
    ],
)
def test_a_line_that_cannot_follow_is_refused(entries: list[Kind], wrong: Kind) -> None:
    """A journal that says what cannot be is not believed."""
    progress = rollout.folded(Entry("a", kind) for kind in entries)
    with pytest.raises(InvalidEntryError):
        rollout.evolve(progress, Entry("a", wrong))


PLAN = """
[update]
command = ["true", "{name}"]
parallel = 2
[[hosts]]
name = "a"
host = "spiffe://t.example/vmhost/a"
source = "10.0.0.1:7601"
destination = "10.0.0.1:7602"
update_domain = 0
[[hosts]]
name = "b"
host = "spiffe://t.example/vmhost/b"
source = "10.0.0.2:7601"
destination = "10.0.0.2:7602"
update_domain = 1
[[availability_sets]]
name = "web"
hosts = ["a", "b"]
[[health]]
kind = "http"
url = "http://{name}/healthz"
"""


def test_a_plan_is_read() -> None:
    """With its defaults where it is silent."""
    plan = Plan.from_toml(PLAN)
    assert [[one.name for one in domain] for domain in plan.order] == [["a"], ["b"]]
    assert plan.update.command == ("true", "{name}")
    assert plan.sets_of("a") == {"web"}
    assert plan.hosts[0].fault_domain == 0


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("[update]", "[updat]", "updat"),
        ("parallel = 2", "parallel = 0", "update.parallel"),
        ("parallel = 2", "parallel = true", "update.parallel"),
        ("parallel = 2", "notice = 2", "update.notice"),
        ("parallel = 2", "patience_s = -1", "update.patience_s"),
        ("parallel = 2", "max_pause_s = 0", "update.max_pause_s"),
        ("parallel = 2", 'in_place = "yes"', "update.in_place"),
        ("parallel = 2", 'qemu_binary = "/opt/qemu"', "update.qemu_binary"),
        ("update_domain = 1", "update_domain = 0", "availability_sets.hosts"),
        ('hosts = ["a", "b"]', 'hosts = ["a", "c"]', "availability_sets.hosts"),
        ('name = "b"', 'name = "a"', "hosts.name"),
        ("vmhost/b", "vmhost/a", "hosts.host"),
        ("vmhost/b", "admin/b", "hosts.host"),
        ("10.0.0.2:7601", "10.0.0.2", "hosts.source"),
        ("update_domain = 1\n", "", "hosts.update_domain"),
        ('kind = "http"', 'kind = "icmp"', "health.kind"),
        ('url = "http://{name}/healthz"', "", "health.url"),
        ("[update]", "[update", "plan"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(old: str, new: str, field: str) -> None:
    """By the name of the field at fault."""
    with pytest.raises(ConfigError) as caught:
        Plan.from_toml(PLAN.replace(old, new, 1))
    assert caught.value.field == field


def test_the_journal_of_the_release_before_is_read(tmp_path: Path) -> None:
    """Its machines left with a destination and a migration; what it was about to do is done now."""
    plan, path = Plan.from_toml(PLAN), tmp_path / "journal"
    lines = [
        f'{{"format": 1, "plan": "{plan.digest}"}}',
        '{"host": "a", "kind": "begun"}',
        '{"host": "a", "kind": "leaving", "machine": "m", "target": "b", "request_id": "r"}',
        '{"host": "a", "kind": "empty"}',
        '{"host": "a", "kind": "failed", "note": "no"}',
    ]
    path.write_text("\n".join(lines) + "\n")
    progress, _ = read(path, plan)
    assert progress.of("a").away["m"].target == "b"
    assert (progress.of("a").stage, progress.of("a").empty, dict(progress.of("a").stays)) == (
        Stage.FAILED,
        True,
        {},
    )


def test_a_journal_cut_at_any_byte_is_a_beginning_of_itself(tmp_path: Path) -> None:
    """A run that is killed while it writes leaves whole lines, and the next one goes on behind them."""
    plan, path = Plan.from_toml(PLAN), tmp_path / "journal"
    entries = [
        Entry("a", Kind.BEGUN),
        Entry("a", Kind.LEAVING, "m", "b", "r"),
        Entry("a", Kind.EMPTY),
        Entry("a", Kind.FAILED, note="ü"),
        Entry("a", Kind.RETRIED),
    ]
    with Journal(path, plan) as journal:
        for entry in entries:
            journal.write(entry)
    whole = path.read_bytes()
    beginnings = [rollout.folded(entries[:count]) for count in range(len(entries) + 1)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with Journal(path, plan) as journal:
            count = max(0, whole[:size].count(b"\n") - 1)
            assert journal.progress == beginnings[count]
            if count < len(entries):
                journal.write(entries[count])
        assert read(path, plan)[0] == beginnings[min(count + 1, len(entries))]


def test_a_journal_of_another_plan_or_of_another_run_is_refused(tmp_path: Path) -> None:
    """Nothing is updated by the word of a journal that is not this plan's, is damaged, or is in use."""
    path = tmp_path / "journal"
    with Journal(path, Plan.from_toml(PLAN)), pytest.raises(ConfigError, match="another update is using it"):
        Journal(path, Plan.from_toml(PLAN))
    with pytest.raises(ConfigError, match="another plan"):
        Journal(path, Plan.from_toml(PLAN + "# changed\n"))
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(ConfigError, match="damaged"):
        Journal(path, Plan.from_toml(PLAN))
