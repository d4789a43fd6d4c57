// SPDX-License-Identifier: Apache-2.0
// Activity: jobs in progress, what happened as lanes over time, and each swap and request with where its time went.

import { complain, note, whyNot } from "./actions.js";
import { h, keep, renew } from "./dom.js";
import { ENDS, SWAPS, download, happenings, words } from "./happenings.js";
import { act, now } from "./server.js";
import { _, bytes, clock, many, number, seconds } from "./words.js";

const WINDOWS_S = [120, 600, 3600];
const MOST_LANES = 10;
const AT_ONCE = 60;
const TICK_MS = 1000;

const KINDS = {
  all: () => _("All"),
  swaps: () => _("Swaps"),
  requests: () => _("Requests"),
  jobs: () => _("Other jobs"),
};

export function activity() {
  let windowS = WINDOWS_S[1];
  let kind = "all";
  let most = AT_ONCE;
  const running = h("div.view", { role: "list", "aria-label": _("Jobs in progress") });
  const lanes = h("div.lanes", { role: "img" });
  const axis = h("div.scale", { "aria-hidden": "true" });
  const windows = choices(
    _("Length of the timeline"),
    WINDOWS_S.map((value) => [value, many("{count} minute", "{count} minutes", value / 60)]),
    windowS,
    (value) => {
      windowS = value;
      update();
    },
  );
  const kinds = choices(
    _("What is listed"),
    Object.entries(KINDS).map(([name, each]) => [name, each()]),
    kind,
    (value) => {
      kind = value;
      most = AT_ONCE;
      update();
    },
  );
  const body = h("tbody", { role: "rowgroup" });
  const heads = [_("Time"), _("What"), _("Where the time went"), _("Took")].map((word, index) =>
    h(`th${index === 3 ? ".is-number" : ""}`, { scope: "col", role: "columnheader" }, word),
  );
  const table = h(
    "table.folds.happened",
    { role: "table", "aria-label": _("What happened") },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads)),
    body,
  );
  const empty = h("p.empty", {}, _("Nothing has happened since the gateway began."));
  const more = h(
    "button.button",
    {
      type: "button",
      hidden: true,
      onclick: () => {
        most += 2 * AT_ONCE;
        update();
      },
    },
    _("Show more"),
  );
  const key = h(
    "ul.legend",
    {},
    [
      ["serving", _("swap")],
      ["cache", _("waits")],
      ["engine", _("until the first byte")],
      ["idle", _("answers")],
      ["bad", _("failed")],
    ].map(([name, word]) => h("li", {}, h(`span.swatch.k-${name}`), word)),
  );
  const element = h(
    "div",
    {},
    running,
    h(
      "section.card",
      { "aria-labelledby": "timeline" },
      h("div.head", {}, h("h2", { id: "timeline" }, _("Timeline")), h("div.right", {}, windows)),
      lanes,
      axis,
      key,
    ),
    h(
      "div.tools",
      {},
      kinds,
      h(
        "button.button",
        { type: "button", onclick: download, style: { "margin-left": "auto" } },
        _("Download as a trace"),
      ),
    ),
    h("div.card.is-flush", {}, table, empty),
    h("div.row", {}, more),
  );
  setInterval(() => {
    if (element.isConnected && !document.hidden && now.state) draw(happenings());
  }, TICK_MS);

  function update() {
    const jobs = Object.entries(now.state.jobs);
    keep(
      running,
      jobs
        .filter(([, job]) => !ENDS.has(job.state))
        .map(([number_, job]) => [number_, () => jobCard(number_, job), JSON.stringify([job, whyNot("memory")])]),
    );
    running.hidden = !running.childElementCount;
    const found = happenings();
    draw(found);
    const shown = found.filter((each) => kind === "all" || each.group === kind).reverse();
    keep(
      body,
      shown.slice(0, most).map((each) => [each.key, () => row(each), each.version]),
    );
    more.hidden = shown.length <= most;
    empty.hidden = shown.length > 0;
    table.hidden = !shown.length;
  }

  function draw(found) {
    const end = Date.now() / 1000;
    const begin = end - windowS;
    const inside = found.filter((each) => each.end > begin && each.group !== "jobs");
    const newest = new Map();
    for (const each of inside) {
      // the last to be set is the last in order
      newest.delete(each.model);
      newest.set(each.model, each.end);
    }
    const names = [...newest.keys()].slice(-MOST_LANES).sort();
    lanes.setAttribute(
      "aria-label",
      _("{swaps} swaps and {requests} requests in the last {minutes} minutes; the table below has each.", {
        swaps: number(inside.filter((each) => each.group === "swaps").length),
        requests: number(inside.filter((each) => each.group === "requests").length),
        minutes: number(windowS / 60),
      }),
    );
    const at = (time) => `${(100 * Math.max(0, time - begin)) / windowS}%`;
    const width = (from, to) => `${(100 * Math.max(0, to - Math.max(from, begin))) / windowS}%`;
    keep(
      lanes,
      names.length
        ? names.map((name) => [name, (old) => old ?? h("div.lane", {}, h("span.small", {}, name), h("div.track")), ""])
        : [["", () => h("p.empty", {}, _("Nothing in this time.")), ""]],
    );
    names.forEach((name) => {
      const lane = [...lanes.children].find((each) => each.firstChild.textContent === name).lastChild;
      const marks = inside
        .filter((each) => each.model === name)
        .flatMap((each) =>
          each.spans.map((span, index) => ({ ...span, key: `${each.key} ${index}`, isHigh: each.group === "swaps" })),
        );
      keep(
        lane,
        marks.map((mark) => [
          mark.key,
          (old) => old ?? h(`i.k-${mark.kind}${mark.isHigh ? ".is-high" : ""}`, { title: mark.title }),
          "",
        ]),
      );
      marks.forEach((mark, index) => {
        lane.children[index].style.setProperty("left", at(mark.begin));
        lane.children[index].style.setProperty("width", width(mark.begin, mark.end));
      });
    });
    renew(
      axis,
      String([windowS, Math.floor(end)]),
      [0, 0.25, 0.5, 0.75, 1].map((part) => h("span", {}, part === 1 ? _("now") : `−${span(windowS * (1 - part))}`)),
    );
  }

  return { element, update };
}

function span(duration) {
  return `${Math.floor(duration / 60)}:${String(Math.round(duration % 60)).padStart(2, "0")}`;
}

function choices(label, values, first, choose) {
  const group = h(
    "div.choices",
    { role: "group", "aria-label": label },
    values.map(([value, word]) =>
      h(
        "button",
        {
          type: "button",
          "aria-pressed": String(value === first),
          onclick: (event) => {
            for (const button of group.children)
              button.setAttribute("aria-pressed", String(button === event.currentTarget));
            choose(value);
          },
        },
        word,
      ),
    ),
  );
  return group;
}

function jobCard(key, job) {
  const share = job.total_bytes ? job.done_bytes / job.total_bytes : null;
  const why = whyNot("memory");
  const bar = h("progress", { max: 1, "aria-label": `${words(job.kind)} ${job.subject}` });
  if (share !== null) bar.value = share;
  const cancel = async () => {
    if (why) return note(_("Cancel"), why, true);
    try {
      await act("cancel", { number: key });
    } catch (error) {
      complain(error, job.subject);
    }
  };
  const progress =
    share !== null
      ? _("{done} of {total}", { done: bytes(job.done_bytes), total: bytes(job.total_bytes) })
      : job.done_bytes
        ? bytes(job.done_bytes)
        : "";
  return h(
    "div.card.job",
    { role: "listitem" },
    h(
      "div.row",
      {},
      h("strong.grow", {}, `${words(job.kind)} ${job.subject}`),
      h("span.dim.small.number", {}, [job.phase || job.state, progress].filter(Boolean).join(" · ")),
      h(
        "button.button",
        {
          type: "button",
          "aria-disabled": why ? "true" : null,
          title: why,
          "data-focus": "cancel",
          "aria-label": `${_("Cancel")}: ${job.subject}`,
          onclick: cancel,
        },
        _("Cancel"),
      ),
    ),
    bar,
  );
}

function row(each) {
  return h(
    "tr",
    { role: "row", data: { kind: each.group } },
    h("td.number.dim", { role: "cell" }, clock(each.begin)),
    h("th.is-wide", { scope: "row", role: "rowheader" }, each.job ? jobWords(each.job) : requestWords(each.request)),
    h("td.is-wide.split", { role: "cell" }, each.job ? phases(each.job) : parts(each.request)),
    h("td.is-number", { role: "cell" }, seconds(each.end - each.begin)),
  );
}

const HOW = {
  "already-active": () => _("it served already"),
  rebind: () => _("another model's engine took it over"),
  wake: () => _("its parked engine woke"),
  start: () => _("a new engine started"),
};

function jobWords(job) {
  const tiers = { stored: _("from the store"), host: _("from host memory"), device: _("from GPU memory") };
  const more =
    job.state === "failed"
      ? [job.message, job.hint, SWAPS.has(job.kind) ? _("What served before went on serving.") : ""].filter(Boolean)
      : [[tiers[job.from_tier], HOW[job.how]?.() ?? job.how].filter(Boolean).join(", ")];
  const tag = { failed: h("span.tag.is-bad", {}, _("failed")), cancelled: h("span.tag", {}, _("cancelled")) }[
    job.state
  ];
  return h(
    "div.names",
    {},
    h("span", {}, `${words(job.kind)} ${job.subject}`),
    tag,
    more.filter(Boolean).map((line) => h("small", {}, line)),
  );
}

function requestWords(request) {
  const tokens = request.completion_tokens ? many("{count} token", "{count} tokens", request.completion_tokens) : "";
  const isBad = request.status >= 400 || request.error;
  const more = [request.endpoint, tokens, request.error].filter(Boolean).join(" · ");
  return h(
    "div.names",
    {},
    h("span", {}, request.model),
    isBad && h("span.tag.is-bad", {}, String(request.status)),
    h("small", {}, more),
  );
}

function phases(job) {
  const found = Object.entries(job.phases).filter(([, took]) => took > 0);
  const shades = ["serving", "engine", "cache", "leased", "more", "idle"];
  return stacked(found.map(([name, took], index) => [shades[index % shades.length], name, took]));
}

function parts(request) {
  const { wait_s: wait, first_byte_s: first, seconds: took } = request;
  const answered = Math.max(first || took, wait);
  return stacked(
    [
      ["cache", _("waits"), wait],
      ["engine", _("until the first byte"), answered - wait],
      ["idle", _("answers"), took - answered],
    ].filter(([, , each]) => each > 0.0005),
  );
}

/** A bar of parts to scale, with their lengths in words. */
function stacked(found) {
  if (!found.length) return [];
  const sum = found.reduce((all, [, , took]) => all + took, 0);
  return [
    h(
      "div.stack",
      { "aria-hidden": "true" },
      found.map(([kind, name, took]) =>
        h(`i.k-${kind}`, { title: `${name} ${seconds(took)}`, style: { width: `${(100 * took) / sum}%` } }),
      ),
    ),
    h(
      "small.dim",
      {},
      found.map(([kind, name, took]) => h("span.part", {}, h(`span.swatch.k-${kind}`), `${name} ${seconds(took)}`)),
    ),
  ];
}
