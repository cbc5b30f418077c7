"""The web page of a service, in a real browser, while real machines move."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.integration.browser import Tab, open_tab
from tests.integration.drains import client, target
from tests.integration.hosts import MIB, World, open_world
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

DESKTOP, PHONE = 1180, 390
NARROWEST = 320


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts whose pages are on loopback ports."""
    ports = {"source_http_listen": "127.0.0.1:0", "dest_http_listen": "127.0.0.1:0"}
    drains = {"drain_look_s": 1.0, "drain_retry_s": 0.5, "drain_measure_s": 2.0}
    async with open_world(**ports, **drains) as opened:
        yield opened


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Tab]:
    """One browser for all tests."""
    async with open_tab() as opened:
        yield opened


@pytest.fixture
async def tab(browser: Tab) -> AsyncIterator[Tab]:
    """The browser's page; whatever it did not like fails the test."""
    browser.complaints.clear()
    browser.requested.clear()
    await browser.look_as()
    yield browser
    assert browser.complaints == []


async def test_a_migration_is_watched_live_and_then_looked_up(world: World, tab: Tab) -> None:
    """Machines, progress and prediction as they change, without a reload; then history, reason, phases and spans."""
    guest = await world.run(memory_mib=64, params={"resident-mib": "48"})
    other = await world.run(memory_mib=32)
    plan = pb.PlanMigrationRequest(
        machine=guest.id, destination=pb.Destination(host=world.b.identity.uri, address=world.b.dest.address)
    )
    async with world.source(world.a) as stub:
        await stub.PlanMigration(plan)
    failed = await world.migrate(other, world.a, world.b, reserve_timeout=0.001)
    await tab.open(f"http://{world.a.source.http}/")
    await tab.until("document.querySelectorAll('#machines tr').length === 2", "both machines are shown")
    assert await tab.text("#host") == "a"
    assert await tab.text("#link") == "Live"
    assert await tab.ask("document.getElementById('running-empty').checkVisibility()")

    running = await world.start(guest, world.a, world.b, max_bandwidth=8 * MIB)
    card = "#running .card"
    await tab.until(f"document.querySelector('{card} .now')?.textContent === 'precopying'", "it is shown")
    share = f"Number(document.querySelector('{card} .progress').getAttribute('aria-valuenow'))"
    before = await tab.until(share, "it gets on")
    await tab.until(f"{share} > {before}", "it gets on further")
    assert guest.spec.name in await tab.text(card)
    assert "Predicted pause" in await tab.text(card)
    assert "Rate" in await tab.text(card)
    await pictures(tab, "running")
    await tab.look_as()

    async with world.source(world.a) as stub:
        await stub.UpdateMigration(pb.UpdateMigrationRequest(id=running, max_bandwidth=0))
    done = await world.ended(world.a, running)
    assert done.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await tab.until("document.querySelectorAll('#history > li').length === 2", "both are history")
    await tab.until(f"!document.querySelector('{card}')", "nothing is on its way")
    await look_up(tab, failed.reason.reason)
    await pictures(tab, "history")
    assert {address.split("/")[2] for address in tab.requested} == {world.a.source.http}


async def look_up(tab: Tab, reason: str) -> None:
    """With the keyboard alone: open both ended migrations, the newest first."""
    await tab.press("j")
    await tab.press("Enter", 13)
    first, second = "#history > li:nth-child(1)", "#history > li:nth-child(2)"
    await tab.until(f"document.querySelector('{first} .spans tbody tr')", "its spans are drawn")
    assert "completed" in await tab.text(first)
    assert "precopying" in await tab.text(f"{first} .legend")
    assert "last round" in await tab.text(f"{first} .spans")
    assert await tab.ask(f"document.querySelectorAll('{first} .spans .pause').length") > 0
    await tab.press("j")
    await tab.press("Enter", 13)
    await tab.until(f"document.querySelector('{second} .note')", "its reason is told")
    assert reason in await tab.text(f"{second} .note")
    await tab.press("k")
    await tab.press("Enter", 13)
    assert not await tab.ask(f"document.querySelector('{first} details').open")
    await tab.press("Enter", 13)


async def pictures(tab: Tab, what: str) -> None:
    """Keep the page as it looks on each screen in each scheme; nothing may stick out on any of them."""
    for width in (DESKTOP, PHONE, NARROWEST):
        for dark in (False, True):
            await tab.look_as(dark=dark, width=width)
            wide = await tab.ask(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert wide <= 0, f"{what} sticks out {wide} pixels at {width}"
            high = await tab.ask("document.querySelector('header').offsetHeight")
            assert high < 200, f"the head of {what} is {high} pixels high at {width}"
            if width != NARROWEST:
                await tab.picture(
                    f"{what}-{'phone' if width == PHONE else 'desktop'}-{'dark' if dark else 'light'}"
                )


async def test_what_arrives_is_shown_at_the_destination(world: World, tab: Tab) -> None:
    """The page of a destination shows what it receives and from whom, and then the machine as its own."""
    guest = await world.run(memory_mib=32)
    running = await world.start(guest, world.a, world.b, max_bandwidth=MIB)
    await tab.open(f"http://{world.b.dest.http}/")
    await tab.until("document.querySelector('#arriving .card')", "it is shown")
    assert guest.spec.name in await tab.text("#arriving .card")
    assert "from a" in await tab.text("#arriving .card")
    await tab.picture("arriving-desktop-light")
    async with world.source(world.a) as stub:
        await stub.UpdateMigration(pb.UpdateMigrationRequest(id=running, max_bandwidth=0))
    assert (await world.ended(world.a, running)).outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await tab.until("!document.querySelector('#arriving .card')", "it has arrived")
    await tab.until("document.getElementById('machines').innerText.includes('owned')", "it is owned here")


async def test_what_waits_says_for_what(world: World, tab: Tab) -> None:
    """A migration in the queue has a card of its own, without progress, that tells its place and the reason."""
    guests = [await world.run() for _ in range(3)]
    started = [await world.start(guest, world.a, world.b, max_bandwidth=MIB) for guest in guests]
    await tab.open(f"http://{world.a.source.http}/")
    await tab.until("document.querySelectorAll('#running .card').length === 3", "all are shown")
    waiting = "#running .card:nth-child(3)"
    await tab.until(
        f"document.querySelector('{waiting} .badge')?.innerText === 'queued'", "the last one waits"
    )
    assert "It waits, as number 1 of 1: " in await tab.text(f"{waiting} .note")
    assert not await tab.ask(f"document.querySelector('{waiting} .progress').checkVisibility()")
    await tab.picture("waiting-desktop-light")
    async with world.source(world.a) as stub:
        for migration_id in started:
            await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
    await tab.until("!document.querySelector('#running .card')", "nothing is left")


async def test_a_host_is_emptied_before_the_eyes_of_an_operator(world: World, tab: Tab) -> None:
    """What is stuck and why, who moves and whose turn is next, that it is empty; and each time what may be done."""
    guests = [await world.run() for _ in range(3)]
    slowly = pb.MigrationOptions(max_bandwidth=MIB)
    await tab.open(f"http://{world.a.source.http}/")
    async with client(world, world.a) as a, client(world, world.b) as b:
        try:
            await b.drain([target(world.a)])
            await a.drain([target(world.b)], options=slowly)
            await tab.until(
                "document.querySelectorAll('#drained .badge.warn').length === 3", "all of them stay"
            )
            section = await tab.text("#drain-section")
            assert "Not empty, and nothing that is left can move 0 of 3 machines have moved" in section
            assert "b: host.draining: " in section, "the host that refuses, and why"
            assert "vmferry undrain" in await tab.text("#drained li:first-child"), "what to do about it"
            assert "You may: do what is said below" in section
            await pictures(tab, "drain-stuck")
            for dark in (False, True):
                await tab.look_as(dark=dark)
                assert await tab.ask(_CONTRAST) == [], f"dark={dark}"
            await tab.look_as()

            await b.undrain()
            words = "document.getElementById('drain-activity').textContent"
            await tab.until(
                f"{words}.includes(' goes next, as soon as one of the ')", "one moves, one is next"
            )
            section = await tab.text("#drain-section")
            assert "Being emptied " in section
            assert "number 1 to go, " in section
            assert "You may: vmferry undrain a stops it" in section
            await pictures(tab, "drain")
            await tab.look_as()
            await a.drain([target(world.b)])  # what waits goes as fast as it can
            async with world.source(world.a) as stub:
                for one in await a.history(open_only=True):
                    await stub.UpdateMigration(pb.UpdateMigrationRequest(id=one.id, max_bandwidth=0))
            await tab.until(
                "document.getElementById('drain-title').textContent === 'Empty'", "the host is empty"
            )
            assert "3 of 3 machines have moved" in await tab.text("#drain-section")
            assert "vmferry undrain a lets machines in again" in await tab.text("#drain-may")
            assert await tab.ask("document.getElementById('draining').checkVisibility()")
            await tab.picture("drain-empty-desktop-light")
        finally:
            await asyncio.gather(a.undrain(), b.undrain())
    await tab.until("!document.getElementById('drain-section').checkVisibility()", "it is undone")
    assert not await tab.ask("document.getElementById('draining').checkVisibility()")
    assert world.a.holdings() == []
    for guest in guests:
        await guest.assert_clean(world.b)


async def test_it_finds_its_service_again(world: World, tab: Tab) -> None:
    """While the service is away the page says so; when it is back, the page is live again by itself."""
    port = world.a.source.http
    world.a.write_config(source_http_listen=port)
    try:
        await world.a.source.restart()
        await tab.open(f"http://{port}/")
        await tab.until("document.getElementById('link').dataset.state === 'live'", "it is live")
        await world.a.source.stop()
        await tab.until("document.getElementById('link').dataset.state === 'lost'", "it says so")
        assert "trying again" in await tab.text("#link")
        await world.a.source.start()
        await tab.until("document.getElementById('link').dataset.state === 'live'", "it is live again")
    finally:
        await tab.open("about:blank")
        # The browser's own words about the lost connection.
        tab.complaints[:] = [one for one in tab.complaints if "ERR_" not in one]
        world.a.write_config()
        await world.a.source.restart()


async def test_nothing_is_taken_for_html(world: World, tab: Tab) -> None:
    """Names, reasons and messages come from elsewhere; whatever they are, they are text. Blocked ones stand out."""
    await tab.open(f"http://{world.a.source.http}/")
    await tab.until("Page.state", "it is live")
    evil = '<img src=x onerror="window.bad=1"><script>window.bad=1</script>'
    host = "spiffe://test.vmferry.example/vmhost/b"
    blockage = {"reason": evil, "message": evil, "remedy": evil}
    machine = {"name": evil, "uuid": "u", "kind": evil, "state": evil, "right": evil, "blockage": blockage}
    reason = {"reason": evil, "message": evil, "remedy": evil}
    common = {"machine": evil, "destination": {"host": host}, "reason": reason, "path": evil, "owner": evil}
    state = {
        "service": "source", "host": host, "version": evil, "draining": True, "arrivals": [], "machines": [machine],
        "migrations": [
            common | {"id": "1", "phase": "MIGRATION_PHASE_PRECOPYING", "outcome": "MIGRATION_OUTCOME_UNKNOWN"}
        ],
    }  # fmt: skip
    ended = [common | {"id": "2", "phase": "MIGRATION_PHASE_ENDED", "outcome": "MIGRATION_OUTCOME_FAILED"}]
    # In one go, so that nothing that comes from the service is drawn in between.
    found = await tab.ask(f"""(() => {{
        Page.ended = {json.dumps(ended)};
        Page.show({json.dumps(state)});
        document.querySelector('summary').click();
        return [document.querySelectorAll('main img, main script').length, window.bad ?? 0,
                document.getElementById('draining').checkVisibility(), document.getElementById('blocked').innerText];
    }})()""")
    assert found[:3] == [0, 0, True]
    assert evil in found[3]


async def test_it_says_whose_spans_are_kept_elsewhere(world: World, tab: Tab) -> None:
    """On hosts that share no folder, the destination's part of a timeline is missing, and is not missing silently."""
    await tab.open(f"http://{world.a.source.http}/")
    await tab.until("typeof Timeline === 'object'", "the scripts are there")
    migration = {"source": "spiffe://t/vmhost/a", "destination": {"host": "spiffe://t/vmhost/b"}}
    own, other = ({"host": name, "children": []} for name in "ab")
    for spans, words in (([own], "what b did"), ([own | {"children": [other]}], "")):
        said = await tab.ask(f"Timeline.absent({json.dumps(migration)}, {json.dumps({'spans': spans})})")
        assert words in said
        assert bool(said) == bool(words)


async def test_everything_has_a_name_and_can_be_read(world: World, tab: Tab) -> None:
    """Whatever takes the focus has a name for a screen reader; text stands out from its ground, dark and light."""
    await world.run()
    await tab.open(f"http://{world.a.source.http}/")
    await tab.until("document.querySelectorAll('#machines tr').length === 1", "the machine is shown")
    tree = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
    roles = {
        "button",
        "link",
        "searchbox",
        "textbox",
        "DisclosureTriangle",
        "table",
        "heading",
        "progressbar",
    }
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node.get("ignored") and node["role"]["value"] in roles
    ]
    assert {"heading", "searchbox"} <= {role for role, _ in named}
    assert [role for role, name in named if not name and role != "table"] == []
    for dark in (False, True):
        await tab.look_as(dark=dark)
        pale = await tab.ask(_CONTRAST)
        assert pale == [], f"dark={dark}"


_CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const pale = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) pale.push(element.outerHTML.slice(0, 80));
  }
  return pale;
})()"""
