// SPDX-License-Identifier: Apache-2.0
// Memory: what serves, and each tier as a bar to scale.

import { ACTIONS, complain, isBusy, run, wayWords, whyNot } from "./actions.js";
import { h, keep, renew } from "./dom.js";
import { resting, servingCard, switcher } from "./serving.js";
import { modelOf, now } from "./server.js";
import { _, ago, bytes, many } from "./words.js";

const KINDS = {
  serving: () => _("serving"),
  leased: () => _("leased"),
  pinned: () => _("pinned"),
  idle: () => _("would make way"),
  stored: () => _("stored"),
  engine: () => _("engines: context, code, graphs"),
  cache: () => _("KV caches"),
  more: () => _("images and others of flashd"),
  others: () => _("other programs"),
};
const WIDE = 0.055; // of a bar: parts of this width have a name in it
const ASK_MS = 120;

function classOf(part) {
  return part.kind === "weights" ? part.held || "idle" : part.kind;
}

function wordsOf(kind, tier) {
  return kind === "engine" && tier.kind === "host" ? _("engines") : KINDS[kind]();
}

function meaning(part, tier) {
  return wordsOf(classOf(part), tier);
}

export function memory() {
  const serving = h("div.now", { role: "list", "aria-label": _("Models that serve") });
  const tiers = h("div.view");
  let isClose = false;
  const scale = h(
    "div.choices",
    { role: "group", "aria-label": _("Scale of the bars") },
    h("button", { type: "button", "aria-pressed": "true", onclick: () => zoom(false) }, _("Whole")),
    h("button", { type: "button", "aria-pressed": "false", onclick: () => zoom(true) }, _("Used by flashd")),
  );
  const element = h(
    "div",
    {},
    switcher(),
    serving,
    h("div.head", {}, h("h2", {}, _("Memory")), h("div.right", {}, scale)),
    tiers,
  );

  function zoom(wanted) {
    isClose = wanted;
    [...scale.children].forEach((button, index) =>
      button.setAttribute("aria-pressed", String(Boolean(index) === wanted)),
    );
    update();
  }

  function update() {
    const { models, engines } = now.state;
    const names = Object.keys(models)
      .filter((name) => models[name].serving)
      .sort();
    const entries = names.map((name) => {
      const engine = Object.values(engines).find((each) => each.model === name && each.state === "serving");
      const facts = [
        models[name].answering,
        models[name].waiting,
        engine?.kind,
        now.state.daemon.active === name,
        isBusy(name),
      ];
      return [name, () => servingCard(name, models[name], engine), JSON.stringify(facts)];
    });
    if (!entries.length)
      entries.push(["", () => h("p.dim.small", { role: "listitem" }, resting()), now.state.daemon.resting]);
    keep(serving, entries);
    keep(
      tiers,
      now.state.tiers.map((tier) => [tier.name, (old) => old ?? tierCard(tier.name), ""]),
    );
    for (const card of tiers.children)
      card.update(
        now.state.tiers.find((tier) => tier.name === card.tier),
        isClose,
      );
  }

  return { element, update };
}

function tierTitle(tier) {
  if (tier.kind === "store") return _("Store");
  if (tier.kind === "host") return _("Host memory");
  return tier.is_shared
    ? _("Memory of {name} and the host", { name: tier.name })
    : _("GPU {name}", { name: tier.name });
}

function tierCard(name) {
  const title = h("h3", { id: `tier-${name}` });
  const numbers = h("span.dim.small.number.right");
  const bar = h("div.bar", {
    role: "group",
    "aria-labelledby": `tier-${name}`,
    onkeydown: arrows,
    onpointerleave: () => preview(null),
  });
  const scale = h("div.scale", { "aria-hidden": "true" });
  const legend = h("ul.legend");
  const detail = h("div.detail", { role: "status" });
  const about = h("div.about", {}, legend, detail);
  const card = h(
    "section.card.tier",
    { "aria-labelledby": `tier-${name}` },
    h("div.head", {}, title, numbers),
    bar,
    scale,
    about,
  );
  let chosen = null; // key of the part that was clicked
  let looked = null; // key of the part under the pointer or with the focus
  let tier = null;
  let asking = 0;
  card.tier = name;

  card.update = (next, isClose) => {
    tier = next;
    renew(title, tierTitle(tier), tierTitle(tier), tier.product ? h("span.dim", {}, ` ${tier.product}`) : null);
    renew(numbers, JSON.stringify([tier.used_bytes, tier.budget_bytes, tier.total_bytes]), numbersOf(tier));
    const sum = tier.parts.reduce((all, part) => all + part.size_bytes, 0);
    // Fine-tunes share parts in the store, so that the models together are larger than what is stored.
    const factor = tier.kind === "store" && sum > tier.used_bytes ? tier.used_bytes / sum : 1;
    // What flashd itself uses, or all that there is.
    const shown = isClose ? tier.parts.filter((part) => part.kind !== "others") : tier.parts;
    const ours = shown.reduce((all, part) => all + part.size_bytes, 0) * factor;
    const whole = isClose ? Math.max(1, ours) : Math.max(tier.total_bytes, sum * factor, 1);
    const parts = shown.map((part) => {
      const key = `${part.kind} ${part.model} ${part.held}`;
      const share = (part.size_bytes * factor) / whole;
      return [key, (old) => segment(old, part, key, share), JSON.stringify([part.size_bytes, share, part.count])];
    });
    const marker =
      !isClose && tier.budget_bytes < tier.total_bytes && tier.kind !== "store" ? tier.budget_bytes / whole : 0;
    if (marker) parts.push(["budget", () => h("i.budget", { style: { width: `${100 * marker}%` } }), String(marker)]);
    keep(bar, parts);
    if (!bar.querySelector('button[tabindex="0"]')) bar.querySelector("button")?.setAttribute("tabindex", "0");
    renew(
      scale,
      JSON.stringify([whole, marker]),
      h("span", {}, "0"),
      marker
        ? h(
            "span.at-budget",
            { style: { left: `clamp(4rem, ${100 * marker}%, 100% - 7.5rem)` } },
            _("budget {size}", { size: bytes(tier.budget_bytes) }),
          )
        : null,
      h("span", {}, bytes(whole)),
    );
    renew(
      legend,
      JSON.stringify([tier.parts.length, tier.used_bytes, sum, tier.total_bytes]),
      legendOf(tier, sum * factor),
    );
    tell();
  };

  function segment(old, part, key, share) {
    const label = [part.model || meaning(part, tier), part.model ? meaning(part, tier) : "", bytes(part.size_bytes)]
      .filter(Boolean)
      .join(", ");
    const element =
      old ??
      h(
        `button.k-${classOf(part)}`,
        {
          type: "button",
          tabindex: "-1",
          "data-focus": key,
          onpointerenter: () => preview(key),
          onfocus: () => preview(key),
          onblur: () => preview(null),
          onclick: () => choose(key),
        },
        h("span"),
        h("span"),
      );
    if (!old) element.setAttribute("tabindex", "-1");
    element.style.setProperty("flex-basis", `${100 * share}%`);
    element.setAttribute(
      "aria-label",
      part.count > 1 ? `${many("{count} model", "{count} models", part.count)}, ${label}` : label,
    );
    element.setAttribute("aria-pressed", String(chosen === key));
    element.firstChild.textContent = share > WIDE ? part.model || meaning(part, tier) : "";
    element.lastChild.textContent = share > WIDE ? bytes(part.size_bytes) : "";
    return element;
  }

  function arrows(event) {
    const parts = [...bar.querySelectorAll("button")];
    const at = parts.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: parts.length - 1 }[event.key];
    if (to === undefined || !parts[to]) return;
    event.preventDefault();
    parts.forEach((part, index) => part.setAttribute("tabindex", index === to ? "0" : "-1"));
    parts[to].focus();
  }

  function preview(key) {
    looked = key;
    tell();
  }

  function choose(key) {
    chosen = chosen === key ? null : key;
    for (const part of bar.querySelectorAll("button"))
      part.setAttribute("aria-pressed", String(part.dataset.focus === chosen));
    tell();
  }

  /** Says what the part is, and what it would displace or be displaced by. */
  function tell() {
    const key = looked ?? chosen;
    const part = tier.parts.find((each) => `${each.kind} ${each.model} ${each.held}` === key);
    const model = part?.model ? modelOf(part.model) : null;
    const facts = JSON.stringify([key, part, model?.last_used_at, model?.serving, model && isBusy(part.model)]);
    if (detail.madeOf === facts) return;
    bar.classList.remove("has-way");
    renew(detail, facts, part ? described(part, model, tier) : null);
    about.classList.toggle("has-part", Boolean(part));
    if (part && model && !model.serving && part.kind === "weights") {
      clearTimeout(asking);
      asking = setTimeout(() => way(part.model, facts), ASK_MS);
    }
  }

  async function way(name, facts) {
    try {
      const [words, others] = await wayWords(name);
      if (detail.madeOf !== facts || !words) return;
      detail.append(h("span.dim", {}, words));
      if (!others.length) return;
      // In all bars: what makes way is mostly in a faster tier.
      for (const each of document.querySelectorAll(".bar")) {
        let isIn = false;
        for (const button of each.querySelectorAll("button")) {
          const makesWay = others.some((other) => button.dataset.focus.startsWith(`weights ${other} `));
          button.classList.toggle("makes-way", makesWay);
          isIn ||= makesWay;
        }
        each.classList.toggle("has-way", isIn);
      }
    } catch (error) {
      if (detail.madeOf === facts) detail.append(h("span.bad", {}, error.message));
    }
  }

  return card;
}

function numbersOf(tier) {
  const values = { used: bytes(tier.used_bytes), budget: bytes(tier.budget_bytes), total: bytes(tier.total_bytes) };
  return tier.kind === "store"
    ? _("{used} of {total}", values)
    : _("{used} of {budget} for models, of {total}", values);
}

function legendOf(tier, sum) {
  const sizes = new Map();
  for (const part of tier.parts) sizes.set(classOf(part), (sizes.get(classOf(part)) ?? 0) + part.size_bytes);
  const items = [...sizes].map(([kind, size]) => {
    return h(
      "li",
      {},
      h(`span.swatch.k-${kind}`),
      h("span", {}, wordsOf(kind, tier)),
      h("span.dim.number", {}, bytes(size)),
    );
  });
  const free = tier.total_bytes - sum;
  if (free > 0)
    items.push(h("li", {}, h("span.swatch.k-free"), h("span", {}, _("free")), h("span.dim.number", {}, bytes(free))));
  if (tier.kind !== "store" && tier.total_bytes > tier.budget_bytes) {
    items.push(
      h("li", {}, h("span", {}, _("reserve")), h("span.dim.number", {}, bytes(tier.total_bytes - tier.budget_bytes))),
    );
  }
  return items;
}

function described(part, model, tier) {
  const kind = classOf(part);
  const facts = [wordsOf(kind, tier), bytes(part.size_bytes)];
  if (part.kind === "engine" || part.kind === "cache") facts.push(part.held);
  if (model && part.kind === "weights") facts.push(_("used {when}", { when: ago(model.last_used_at) }));
  const found = [
    h(
      "strong",
      {},
      part.model || (part.count > 1 ? many("{count} model", "{count} models", part.count) : wordsOf(kind, tier)),
    ),
    h("span.dim", {}, facts.join(" · ")),
  ];
  if (model && part.kind === "weights") {
    const fitting = ACTIONS.filter(
      (each) => ["serve", "park", "evict"].includes(each.name) && each.suits(model, part.model),
    );
    for (const each of fitting) {
      if (whyNot(each.right)) continue;
      found.push(
        h(
          "button.button",
          {
            type: "button",
            disabled: isBusy(part.model),
            "data-focus": `${each.name} ${part.model}`,
            onclick: () => run(each, part.model).catch(complain),
          },
          each.words(),
        ),
      );
    }
  }
  return found;
}
