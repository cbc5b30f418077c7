// The timeline of a migration: its phases to scale, and the spans of its trace.
"use strict";

const Timeline = {
  PAUSED: new Set(["switching", "handing off"]),

  // A bar of phases with a legend.
  phases(migration) {
    const timings = (migration.timings || []).map((timing) => ({
      name: Format.word(timing.phase, "MIGRATION_PHASE_"),
      seconds: Format.seconds(timing.elapsed),
    }));
    const whole = timings.reduce((sum, timing) => sum + timing.seconds, 0) || 1;
    const bar = Page.make("div", { class: "phases", role: "img" });
    bar.setAttribute("aria-label", timings.map((one) => `${one.name} ${Format.time(one.seconds)}`).join(", "));
    const legend = Page.make("ul", { class: "legend" });
    for (const timing of timings) {
      const part = Page.make("span", { class: Timeline.PAUSED.has(timing.name) ? "paused" : "", title: timing.name });
      part.style.flexGrow = String(timing.seconds / whole);
      bar.append(part);
      legend.append(Page.make("li", {}, `${timing.name} ${Format.time(timing.seconds)}`));
    }
    return Page.make("div", { class: "timeline" }, Page.make("h4", {}, "Phases"), bar, legend);
  },

  // The spans of a trace, fetched when they are wanted; says so if there are none.
  async spans(migration, place) {
    let found;
    try {
      const answer = await fetch(`api/traces/${encodeURIComponent(migration.trace_id)}`);
      if (!answer.ok) throw new Error(answer.statusText);
      found = await answer.json();
    } catch (error) {
      place.replaceChildren(Page.make("p", { class: "trace" }, `Spans: ${error.message || "not here"}.`));
      return;
    }
    place.replaceChildren(Timeline.table(found, 1000 * Format.seconds(migration.downtime)));
    const absent = Timeline.absent(migration, found);
    if (absent) place.append(Page.make("p", { class: "trace" }, absent));
  },

  // Whose spans are not here: each host writes its own.
  absent(migration, found) {
    const there = new Set(Timeline.flat(found.spans).map((row) => row.host));
    const hosts = [migration.source, migration.destination?.host].filter((host) => host && !there.has(host) && !there.has(Format.host(host)));
    return hosts.length ? `Not among them: what ${hosts.map(Format.host).join(" and ")} did. Each host keeps its own spans; give the folders of both to the command above, or look into your collector.` : "";
  },

  flat(nodes, depth = 0) {
    return nodes.flatMap((node) => [{ ...node, depth }, ...Timeline.flat(node.children, depth + 1)]);
  },

  table(found, pauseMs) {
    const rows = Timeline.flat(found.spans);
    const end = Math.max(...rows.map((row) => row.start_ms + row.duration_ms), 0.001);
    const from = pauseMs && rows.find((row) => row.name === "pause");
    const home = (rows.find((row) => row.name === "migrate") || rows[0]).host;
    const body = Page.make("tbody", {});
    for (const row of rows) {
      const lane = Page.make("div", { class: "lane" });
      if (from) lane.append(Timeline.piece("pause", from.start_ms, pauseMs, end));
      lane.append(Timeline.piece(row.host === home ? "span" : "span other", row.start_ms, row.duration_ms, end));
      const name = Page.make("td", { title: `${row.name} on ${row.host}/${row.service}` }, row.name.split("/").pop());
      name.style.paddingLeft = `${Math.min(row.depth, 8) * 0.75}rem`;
      body.append(Page.make("tr", { class: row.failed ? "failed" : "" }, name, Page.make("td", {}, lane),
        Page.make("td", { class: "number" }, Format.time(row.duration_ms / 1000))));
    }
    const hosts = [...new Set(rows.map((row) => row.host))];
    const head = Page.make("thead", {}, Page.make("tr", {}, Page.make("th", { scope: "col" }, "Span"),
      Page.make("th", { scope: "col" }, `0 to ${Format.time(end / 1000)}`),
      Page.make("th", { scope: "col", class: "number" }, "Took")));
    const legend = hosts.map((host) => Page.make("li", {}, Page.make("span", { class: host === home ? "swatch" : "swatch other" }),
      `host ${host}`));
    if (from) legend.push(Page.make("li", {}, Page.make("span", { class: "swatch pause" }), `the guest's pause, ${Format.time(pauseMs / 1000)}`));
    return Page.make("div", { class: "timeline" }, Page.make("h4", {}, "Spans"),
      Page.make("table", { class: "spans" }, head, body), Page.make("ul", { class: "legend" }, ...legend),
      Page.make("p", { class: "trace" }, `As a drawing, with the spans of all hosts: vmferry trace ${found.trace_id} --dir … --out trace.html`));
  },

  piece(kind, start, length, end) {
    const piece = Page.make("span", { class: kind });
    piece.style.left = `${(100 * start) / end}%`;
    piece.style.width = `${(100 * length) / end}%`;
    return piece;
  },
};
