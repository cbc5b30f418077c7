// What is shown, kept up to date by server-sent events. Elements are kept as long as what they show exists, so that
// focus, selection and what is open stay as they are. Nothing here is ever taken for HTML.
"use strict";

const Page = {
  PHASES: ["negotiating", "reserving", "precopying", "switching", "handing off", "releasing"],
  OUTCOMES: { completed: "good", failed: "bad", cancelled: "", unknown: "warn" },
  STATES: { running: "good", paused: "warn", incoming: "accent", dead: "bad", stopped: "", unspecified: "" },
  state: null,
  ended: [],

  make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value) element.setAttribute(name, value);
    element.append(...children);
    return element;
  },

  of: (id) => document.getElementById(id),

  // Sets text only where it differs: a screen reader would speak again otherwise.
  say(element, text) {
    if (element.textContent !== text) element.textContent = text;
  },

  // One element for each item, in order; kept by key, made and brought up to date by the functions.
  keyed(parent, items, key, make, update) {
    const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
    const wanted = items.map((item) => {
      const id = key(item);
      const element = known.get(id) || make(item);
      element.dataset.key = id;
      known.delete(id);
      update(element, item);
      return element;
    });
    for (const gone of known.values()) gone.remove();
    wanted.forEach((element, index) => {
      if (parent.children[index] !== element) parent.insertBefore(element, parent.children[index] || null);
    });
  },

  show(state) {
    Page.state = state;
    const source = state.service === "source";
    const name = Format.host(state.host);
    document.title = `${name} · vmferry`;
    Page.say(Page.of("host"), name);
    Page.say(Page.of("about"), `${source ? "Source" : "Destination"} service of ${state.host}, vmferry ${state.version}`);
    Page.of("draining").hidden = !state.draining;
    for (const id of ["running-section", "history-section"]) Page.of(id).hidden = !source;
    Page.of("arriving-section").hidden = source;
    const found = Page.of("filter").value.trim().toLowerCase();
    const matches = (...texts) => !found || texts.some((text) => (text || "").toLowerCase().includes(found));
    Page.drain(state.drain || {}, name);
    Page.blocked(state.machines.filter((machine) => machine.blockage));
    Page.running(state.migrations);
    if (state.open > state.migrations.length) Page.say(Page.of("running-count"), `${state.open}, the first ${state.migrations.length} are shown`);
    Page.arriving(state.arrivals);
    Page.machines(state.machines.filter((one) => matches(one.name, one.uuid, one.state, one.right)));
    Page.history(Page.ended.filter((one) => (
      matches(one.machine, one.machine_id, one.destination?.host, Format.outcome(one), one.reason?.reason))));
  },

  list(id, items, key, make, update) {
    Page.keyed(Page.of(id), items, key, make, update);
    Page.say(Page.of(`${id}-count`), items.length ? String(items.length) : "");
    Page.of(`${id}-empty`).hidden = items.length > 0;
  },

  DRAINED: { blocked: "bad", stays: "warn", moving: "accent", waiting: "", moved: "good" },
  DRAINS: {
    DRAINING: ["Being emptied", "vmferry undrain HOST stops it: what is under way ends as it will, the rest stays."],
    STUCK: ["Not empty, and nothing that is left can move", "do what is said below, or name further hosts (vmferry drain HOST --to …), or give it up (vmferry undrain HOST)."],
    DRAINED: ["Empty", "switch the host off, or update it. vmferry undrain HOST lets machines in again."],
  },

  drain(drain, host) {
    const machines = [...(drain.machines || [])];
    const moved = machines.filter((one) => one.state === "DRAINED_MACHINE_STATE_MOVED").length;
    const [title, may] = Page.DRAINS[Format.word(drain.state, "DRAIN_STATE_").toUpperCase()] || ["Being emptied", ""];
    Page.of("drain-section").hidden = !drain.state && !drain.problem;
    Page.say(Page.of("drain-title"), title);
    // The list of machines is there as soon as they have been looked at.
    Page.say(Page.of("drain-count"), machines.length || drain.state === "DRAIN_STATE_DRAINED" ? `${moved} of ${machines.length} machines have moved` : "");
    const share = machines.length ? (100 * moved) / machines.length : drain.state === "DRAIN_STATE_DRAINED" ? 100 : 0;
    Page.of("drain-bar").firstElementChild.style.width = `${share}%`;
    Page.of("drain-bar").setAttribute("aria-valuenow", share.toFixed(0));
    const tell = (id, text) => {
      Page.of(id).hidden = !text;
      Page.say(Page.of(id), text);
    };
    tell("drain-problem", drain.problem ? Page.why(drain.problem) : "");
    tell("drain-activity", drain.activity ? `Now: ${drain.activity}.` : "");
    tell("drain-may", may ? `You may: ${may.replaceAll("HOST", host)}` : "");
    const state = (one) => Format.word(one.state, "DRAINED_MACHINE_STATE_");
    const order = Object.keys(Page.DRAINED);
    machines.sort((one, other) => order.indexOf(state(one)) - order.indexOf(state(other)) || (one.turn || 0) - (other.turn || 0)
      || (one.machine || "").localeCompare(other.machine || "", "en", { numeric: true }));
    Page.keyed(Page.of("drained"), machines, (one) => one.machine_id, () => {
      const row = Page.make("li", {}, Page.make("span", { class: "badge" }), Page.make("strong", {}), Page.make("span", { class: "way" }));
      return row;
    }, (row, one) => {
      const [badge, name, way] = row.children;
      badge.className = `badge ${Page.DRAINED[state(one)] ?? ""}`;
      Page.say(badge, state(one));
      Page.say(name, one.machine || one.machine_id);
      Page.say(way, Page.drained(one, state(one)));
    });
  },

  // What there is to say of one machine: where it goes, when its turn comes, or everything that is in its way.
  drained(one, state) {
    const placed = state === "moving" || state === "moved";
    if (placed) return one.destination ? `to ${Format.host(one.destination.host)}` : "";
    const parts = [];
    if (state === "waiting" && one.turn) {
      const cost = one.predicted_cost ? `, ${Format.time(Format.seconds(one.predicted_cost))} ${one.cost_measured ? "predicted" : "estimated"}` : "";
      parts.push(`number ${one.turn} to go${cost}.`);
    }
    for (const obstacle of one.obstacles || []) {
      parts.push(`${obstacle.destination ? `${Format.host(obstacle.destination)}: ` : ""}${obstacle.tried ? "tried, " : ""}${Page.why(obstacle)}`);
    }
    return parts.join(" ");
  },

  blocked(machines) {
    Page.of("attention").hidden = machines.length === 0;
    Page.keyed(Page.of("blocked"), machines, (one) => one.uuid, () => Page.make("li", { class: "card bad" }), (card, machine) => {
      card.replaceChildren(
        Page.make("div", { class: "head" }, Page.make("h3", {}, machine.name || machine.uuid),
          Page.make("span", { class: "badge bad" }, machine.blockage.reason || "blocked")),
        Page.make("p", {}, machine.blockage.message || ""),
        Page.make("p", { class: "quiet" }, machine.blockage.remedy || ""),
      );
    });
  },

  running(migrations) {
    Page.list("running", migrations, (one) => one.id, Page.card, (card, migration) => {
      const at = Page.PHASES.indexOf(Format.phase(migration).replace("announced", "negotiating"));
      card.parts.steps.forEach((step, index) => {
        step.className = index < at ? "done" : index === at ? "now" : "";
        if (index === at) step.setAttribute("aria-current", "step");
        else step.removeAttribute("aria-current");
      });
      const outcome = Format.outcome(migration);
      card.parts.badge.className = `badge ${outcome === "unknown" ? "warn" : "accent"}`;
      Page.say(card.parts.badge, outcome === "unknown" ? "outcome unknown" : Format.phase(migration));
      card.parts.way.hidden = card.parts.bar.hidden = at < 0;
      Page.progress(card, migration);
      Page.figures(card.parts.figures, Page.facts(migration));
      const note = Page.trouble(migration);
      card.parts.note.hidden = !note;
      Page.say(card.parts.note, note);
    });
  },

  card(migration) {
    const steps = Page.PHASES.map((name) => Page.make("li", {}, name));
    const parts = {
      steps,
      way: Page.make("ol", { class: "steps" }, ...steps),
      badge: Page.make("span", { class: "badge accent" }),
      filled: Page.make("span", {}),
      figures: Page.make("dl", { class: "figures" }),
      note: Page.make("p", { class: "note", role: "status" }),
    };
    parts.bar = Page.make("div", { class: "progress", role: "progressbar", "aria-label": `Memory of ${migration.machine}`,
      "aria-valuemin": "0", "aria-valuemax": "100" }, parts.filled);
    const card = Page.make("li", { class: "card" },
      Page.make("div", { class: "head" }, Page.make("h3", {}, migration.machine),
        Page.make("span", { class: "way" }, `to ${Format.host(migration.destination?.host)}`), parts.badge),
      parts.way, parts.bar, parts.figures, parts.note);
    card.parts = parts;
    card.round = { number: -1, bytes: 0 };
    return card;
  },

  progress(card, migration) {
    const progress = migration.progress || {};
    const left = Number(progress.remaining_bytes || 0);
    if (card.round.number !== progress.round) card.round = { number: progress.round, bytes: 0 };
    card.round.bytes = Math.max(card.round.bytes, left);
    const switched = Page.PHASES.indexOf(Format.phase(migration)) > 2;
    const share = switched ? 1 : card.round.bytes ? 1 - left / card.round.bytes : 0;
    card.parts.filled.style.width = `${(100 * share).toFixed(1)}%`;
    card.parts.bar.setAttribute("aria-valuenow", (100 * share).toFixed(0));
    card.parts.bar.setAttribute("aria-valuetext", `round ${progress.round || 0}, ${Format.size(left)} left`);
  },

  facts(migration) {
    const progress = migration.progress || {};
    const predicted = migration.prediction;
    const facts = [["Running for", Format.time(Format.seconds(migration.total))]];
    if (progress.round) facts.push(["Round", String(progress.round), `${Format.size(progress.remaining_bytes)} left of it`]);
    if (progress.sent_bytes) facts.push(["Sent", Format.size(progress.sent_bytes), `the machine has ${Format.size(progress.memory_bytes)}`]);
    if (progress.bytes_per_second) facts.push(["Rate", Format.rate(progress.bytes_per_second)]);
    if (progress.dirty_bytes_per_second) facts.push(["Guest writes", Format.rate(progress.dirty_bytes_per_second)]);
    if (migration.downtime) facts.push(["Pause", Format.time(Format.seconds(migration.downtime))]);
    else if (progress.expected_downtime) facts.push(["Pause if switched now", Format.time(Format.seconds(progress.expected_downtime)),
      progress.allowed_downtime ? `${Format.time(Format.seconds(progress.allowed_downtime))} is acceptable` : ""]);
    if (predicted) facts.push(["Predicted pause", Page.expected(predicted.downtime), Page.range(predicted.downtime)]);
    if (predicted) facts.push(["Predicted length", Page.expected(predicted.total), predicted.converges ? Page.range(predicted.total) : "would not converge"]);
    if (progress.throttle_percent) facts.push(["Guest slowed down", `${progress.throttle_percent} %`]);
    if (progress.reconnects) facts.push(["Reconnects", String(progress.reconnects)]);
    return facts;
  },

  expected: (predicted) => Format.time(Format.seconds(predicted?.expected)),
  range: (predicted) => `${Format.time(Format.seconds(predicted?.low))} to ${Format.time(Format.seconds(predicted?.high))}`,

  figures(list, facts) {
    Page.keyed(list, facts, ([name]) => name, ([name]) => {
      const value = Page.make("dd", {}, "");
      return Page.make("div", {}, Page.make("dt", {}, name), value);
    }, (element, [, value, small]) => {
      const shown = element.lastChild;
      const key = `${value}|${small || ""}`;
      if (shown.dataset.shown === key) return;
      shown.dataset.shown = key;
      shown.replaceChildren(value, ...(small ? [Page.make("small", {}, small)] : []));
    });
  },

  trouble(migration) {
    const progress = migration.progress || {};
    if (progress.disconnected_since) {
      return `The connection is lost. It is tried again for ${Format.time(Format.seconds(progress.reconnect_left))}; the guest runs on.`;
    }
    const queue = migration.queue;
    if (queue) return `It waits, as number ${queue.position} of ${queue.length}: ${queue.waits_for || "for room"}.`;
    return migration.reason ? Page.why(migration.reason) : "";
  },

  why: (reason) => `${reason.reason}: ${(reason.message || "").replace(/\.?$/, ".")} ${reason.remedy || ""}`,

  arriving(arrivals) {
    Page.list("arriving", arrivals, (one) => one.migration_id, () => {
      const badge = Page.make("span", { class: "badge" });
      const figures = Page.make("dl", { class: "figures" });
      const title = Page.make("h3", {});
      const way = Page.make("span", { class: "way" });
      const card = Page.make("li", { class: "card" }, Page.make("div", { class: "head" }, title, way, badge), figures);
      card.parts = { badge, figures, title, way };
      return card;
    }, (card, one) => {
      Page.say(card.parts.title, one.machine);
      Page.say(card.parts.way, `from ${Format.host(one.source)}`);
      card.parts.badge.className = `badge ${one.prepared ? "good" : "accent"}`;
      Page.say(card.parts.badge, one.prepared ? "complete, waits for the source" : "receiving");
      Page.figures(card.parts.figures, [["Memory", Format.size(one.memory_bytes)],
        ["Memory taken", Format.size(one.reserved_bytes)], ["Last sign of the source", `${Format.time(one.silent_s)} ago`]]);
    });
  },

  machines(machines) {
    Page.list("machines", machines, (one) => one.uuid, () => {
      const row = Page.make("tr", {});
      for (let column = 0; column < 6; column += 1) row.append(Page.make("td", { class: column > 3 ? "number" : "" }));
      row.children[1].append(Page.make("span", { class: "badge" }));
      return row;
    }, (row, machine) => {
      const [name, state, right, kind, memory, vcpus] = row.children;
      Page.say(name, machine.name || machine.uuid);
      name.title = machine.uuid;
      state.firstChild.className = `badge ${Page.STATES[machine.state] ?? ""}`;
      Page.say(state.firstChild, machine.state === "unspecified" ? "not known" : machine.state);
      Page.say(right, machine.right === "unspecified" ? "no journal speaks of it" : machine.right.replaceAll("_", " "));
      Page.say(kind, machine.kind || "");
      Page.say(memory, machine.memory_mib ? Format.size(machine.memory_mib * 1048576) : "");
      Page.say(vcpus, machine.vcpus ? String(machine.vcpus) : "");
    });
  },

  history(migrations) {
    Page.list("history", migrations, (one) => one.id, Page.row, (row, migration) => {
      Page.say(row.when, Format.ago(migration.end_time, Date.now()));
    });
  },

  row(migration) {
    const outcome = Format.outcome(migration);
    const when = Page.make("span", { class: "when" });
    const reason = (migration.reason?.reason || "").toLowerCase().replaceAll("_", " ");
    const figure = migration.downtime ? `${Format.time(Format.seconds(migration.downtime))} pause` : reason === outcome ? "" : reason;
    const inside = Page.make("div", { class: "inside" });
    const details = Page.make("details", {}, Page.make("summary", {},
      Page.make("span", { class: `badge ${Page.OUTCOMES[outcome] || ""}` }, outcome),
      Page.make("strong", {}, migration.machine), Page.make("span", { class: "way" }, `to ${Format.host(migration.destination?.host)}`),
      Page.make("span", { class: "number figure" }, figure), when), inside);
    details.addEventListener("toggle", () => {
      if (details.open && !inside.firstChild) Page.details(migration, inside);
    });
    const row = Page.make("li", {}, details);
    row.when = when;
    return row;
  },

  details(migration, inside) {
    const progress = migration.progress || {};
    const predicted = migration.prediction;
    const facts = [["Took", Format.time(Format.seconds(migration.total)), predicted ? `predicted ${Page.expected(predicted.total)}` : ""]];
    if (migration.downtime) facts.push(["Pause", Format.time(Format.seconds(migration.downtime)), predicted ? `predicted ${Page.expected(predicted.downtime)}` : ""]);
    facts.push(["Rounds", String(progress.round || 0)], ["On the wire", Format.size(progress.wire_bytes)],
      ["Path", migration.path || "none"], ["Reconnects", String(progress.reconnects || 0)],
      ["Belongs to", migration.owner ? Format.host(migration.owner) : "not known"]);
    const figures = Page.make("dl", { class: "figures" });
    Page.figures(figures, facts);
    const spans = Page.make("div", {}, Page.make("p", { class: "trace" }, "Reading spans"));
    inside.append(figures);
    if (migration.reason) {
      inside.append(Page.make("p", { class: "note bad" }, Page.why(migration.reason)));
    }
    inside.append(Timeline.phases(migration));
    if (migration.trace_id) {
      inside.append(spans);
      Timeline.spans(migration, spans);
    }
    inside.append(Page.make("p", { class: "trace" }, `Migration ${migration.id}`));
  },

  connect() {
    const link = Page.of("link");
    const tell = (state, text) => {
      link.dataset.state = state;
      Page.say(link, text);
    };
    const events = new EventSource("api/events");
    events.addEventListener("history", (event) => {
      Page.ended = JSON.parse(event.data);
      if (Page.state) Page.show(Page.state);
    });
    events.addEventListener("state", (event) => {
      Page.show(JSON.parse(event.data));
      tell("live", "Live");
    });
    events.onopen = () => tell("live", "Live");
    events.onerror = () => {
      tell("lost", "No connection: trying again");
      // A browser gives up by itself on some errors, such as a service that is being restarted behind a tunnel.
      if (events.readyState === EventSource.CLOSED) setTimeout(Page.connect, 2000);
    };
  },

  keys(event) {
    const filter = Page.of("filter");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && document.activeElement === filter) {
      filter.value = "";
      filter.blur();
      Page.show(Page.state);
    }
    if (document.activeElement === filter) return;
    if (event.key === "/") {
      event.preventDefault();
      filter.focus();
    } else if (event.key === "j" || event.key === "k") {
      const stops = [...document.querySelectorAll("summary")];
      const at = stops.indexOf(document.activeElement);
      const next = stops[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
      if (next) next.focus();
    }
  },
};

document.addEventListener("keydown", Page.keys);
document.addEventListener("DOMContentLoaded", () => {
  Page.of("filter").addEventListener("input", () => Page.state && Page.show(Page.state));
  Page.connect();
});
