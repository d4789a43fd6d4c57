// SPDX-License-Identifier: Apache-2.0
// Models: all of them in a table with a filter, and what can be done to each.

import { ACTIONS, asked, complain, isBusy, note, run, wayWords, whyNot } from "./actions.js";
import { h, icon, keep } from "./dom.js";
import { act, changed, modelOf, now } from "./server.js";
import { _, ago, bytes, many, number } from "./words.js";

const AT_ONCE = 100; // rows; more are made when they come into sight
const TIERS = { device: 2, host: 1, stored: 0 };
const COLUMNS = [
  { name: "name", words: () => _("Name"), value: ([name]) => name.toLowerCase() },
  {
    name: "where",
    words: () => _("Where"),
    value: ([, model]) => -(TIERS[model.residency] ?? 0) - (model.serving ? 4 : 0),
  },
  { name: "size", words: () => _("Size"), isNumber: true, value: ([, model]) => -model.size_bytes },
  {
    name: "context",
    words: () => _("Context"),
    isNumber: true,
    isOptional: true,
    value: ([, model]) => -model.context_length,
  },
  {
    name: "used",
    words: () => _("Last used"),
    isNumber: true,
    isOptional: true,
    value: ([, model]) => -model.last_used_at,
  },
];
const KINDS = {
  all: { words: () => _("All"), has: () => true },
  serving: { words: () => _("Serving"), has: (model) => model.serving },
  memory: { words: () => _("In memory"), has: (model) => model.residency !== "stored" },
  pinned: { words: () => _("Pinned"), has: (model) => model.pinned },
};

export function models() {
  let text = "";
  let kind = "all";
  let sorted = { name: "name", isReverse: false };
  let most = AT_ONCE;
  const filter = h("input.field.filter", {
    type: "search",
    placeholder: _("Filter by name, alias, family or capability"),
    "aria-label": _("Filter"),
    spellcheck: false,
    oninput: () => {
      text = filter.value.toLowerCase();
      most = AT_ONCE;
      update();
    },
  });
  const kinds = h(
    "div.choices",
    { role: "group", "aria-label": _("Which models") },
    Object.entries(KINDS).map(([name, each]) =>
      h(
        "button",
        { type: "button", "aria-pressed": String(name === kind), data: { kind: name }, onclick: () => choose(name) },
        each.words(),
      ),
    ),
  );
  const pullButton = h("button.button", { type: "button", onclick: pull }, _("Pull …"));
  const count = h("p.dim.small", { role: "status" });
  const heads = COLUMNS.map((column) =>
    h(
      `th${column.isNumber ? ".is-number" : ""}`,
      { scope: "col", role: "columnheader" },
      h("button", { type: "button", onclick: () => sort(column.name) }, column.words()),
    ),
  );
  const body = h("tbody", { role: "rowgroup" });
  const table = h(
    "table.folds",
    { role: "table", "aria-label": _("Models") },
    h(
      "thead",
      { role: "rowgroup" },
      h(
        "tr",
        { role: "row" },
        heads,
        h("th", { scope: "col", role: "columnheader" }, h("span.unseen", {}, _("Actions"))),
      ),
    ),
    body,
  );
  const more = h("button.button", {
    type: "button",
    hidden: true,
    onclick: () => {
      most += 10 * AT_ONCE;
      update();
    },
  });
  const empty = h("p.empty");
  const element = h(
    "div",
    {},
    h("div.tools", {}, filter, kinds, pullButton),
    count,
    h("div.card.is-flush", {}, table, empty),
    h("div.row", {}, more),
  );
  new IntersectionObserver(
    (seen) => {
      if (seen.some((each) => each.isIntersecting) && !more.hidden) {
        most += AT_ONCE;
        update();
      }
    },
    { rootMargin: "400px" },
  ).observe(more);
  document.addEventListener("busy", changed);

  function choose(name) {
    kind = name;
    for (const button of kinds.children) button.setAttribute("aria-pressed", String(button.dataset.kind === name));
    update();
  }

  function sort(name) {
    sorted = { name, isReverse: sorted.name === name && !sorted.isReverse };
    update();
  }

  function matches(name, model) {
    if (!KINDS[kind].has(model)) return false;
    if (!text) return true;
    const words = [
      name,
      ...model.aliases,
      ...model.adapters,
      model.architecture,
      model.format,
      ...model.capabilities,
      model.engine,
    ];
    return words.some((word) => word.toLowerCase().includes(text));
  }

  function update() {
    if (!now.state) return;
    const all = Object.entries(now.state.models);
    const found = all.filter(([name, model]) => matches(name, model));
    const { value } = COLUMNS.find((column) => column.name === sorted.name);
    const keys = new Map(found.map((entry) => [entry[0], value(entry)]));
    const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    found.sort(([a], [b]) => order(keys.get(a), keys.get(b)) || order(a, b));
    if (sorted.isReverse) found.reverse();
    COLUMNS.forEach((column, index) => {
      if (column.name === sorted.name)
        heads[index].setAttribute("aria-sort", sorted.isReverse ? "descending" : "ascending");
      else heads[index].removeAttribute("aria-sort");
    });
    const families = new Map();
    for (const [, model] of all) families.set(familyOf(model), (families.get(familyOf(model)) ?? 0) + 1);
    const minute = Math.floor(Date.now() / 60000);
    keep(
      body,
      found.slice(0, most).map(([name, model]) => {
        const facts = [
          model,
          isBusy(name),
          now.state.daemon.active === name,
          families.get(familyOf(model)),
          model.last_used_at ? minute : 0,
        ];
        return [name, () => row(name, model, families.get(familyOf(model))), JSON.stringify(facts)];
      }),
    );
    table.setAttribute("aria-rowcount", String(found.length + 1));
    more.hidden = found.length <= most;
    more.textContent = many("Show {count} more", "Show {count} more", found.length - most);
    empty.hidden = found.length > 0;
    empty.textContent = all.length
      ? _("No model fits the filter.")
      : _("There are no models yet. Drop one into the models folder, or pull one.");
    table.hidden = !found.length;
    count.textContent =
      found.length === all.length
        ? many("{count} model", "{count} models", all.length)
        : _("{some} of {all} models", { some: number(found.length), all: number(all.length) });
    pullButton.title = whyNot("models");
    pullButton.setAttribute("aria-disabled", String(Boolean(whyNot("models"))));
  }

  async function pull() {
    if (whyNot("models")) return note(_("Pull …"), whyNot("models"), true);
    const repository = await asked(
      _("Pull a model"),
      _("It is downloaded from the Hugging Face Hub, and converted meanwhile."),
      _("Repository"),
      "Qwen/Qwen3-0.6B",
      _("Pull"),
    );
    if (!repository) return;
    try {
      await act("pull", { repository });
      note(_("{name} is pulled: see Activity", { name: repository }));
    } catch (error) {
      complain(error, repository);
    }
  }

  return { element, update };
}

/** Fine-tunes of one base have its architecture and its tensors. */
function familyOf(model) {
  return `${model.architecture} ${model.tensors} ${model.dtype}`;
}

function placeOf(model) {
  if (model.serving) return h("span.tag.is-serving", {}, _("serves"), model.engine ? ` · ${model.engine}` : "");
  const words = { device: _("GPU memory"), host: _("host memory"), stored: _("stored") };
  return h("span.tag", {}, words[model.residency] ?? model.residency);
}

function row(name, model, inFamily) {
  const family =
    inFamily > 1
      ? `${model.architecture}, ${many("{count} of this family", "{count} of this family", inFamily)}`
      : model.architecture;
  const more = [
    family,
    model.format === "gguf" ? "GGUF" : "",
    model.aliases.join(", "),
    model.adapters.length ? many("{count} adapter", "{count} adapters", model.adapters.length) : "",
  ]
    .filter(Boolean)
    .join(" · ");
  const main = ACTIONS.find((each) => ["serve", "park"].includes(each.name) && each.suits(model, name));
  const isWorking = isBusy(name);
  return h(
    "tr",
    { role: "row", data: { model: name } },
    h(
      "th.is-wide",
      { scope: "row", role: "rowheader" },
      h(
        "div.names",
        {},
        name,
        now.state.daemon.active === name && h("span.tag", {}, _("active")),
        model.pinned && h("span.tag", { title: _("pinned") }, icon("pin"), h("span.unseen", {}, _("pinned"))),
        model.private && h("span.tag", { title: _("private") }, icon("lock"), h("span.unseen", {}, _("private"))),
        model.waiting > 0 && h("span.tag", {}, many("{count} waits", "{count} wait", model.waiting)),
        h("small", {}, more),
      ),
    ),
    h("td", { role: "cell" }, placeOf(model)),
    h("td.is-number", { role: "cell" }, bytes(model.size_bytes)),
    h("td.is-number.is-optional", { role: "cell" }, model.context_length ? number(model.context_length) : "–"),
    h("td.is-number.is-optional.dim", { role: "cell" }, ago(model.last_used_at)),
    h(
      "td.is-end",
      { role: "cell" },
      h(
        "div.acts",
        {},
        isWorking && h("span.spinner", { role: "img", "aria-label": _("in progress") }),
        h(
          "button.button",
          {
            type: "button",
            disabled: isWorking,
            "data-focus": `main ${name}`,
            "aria-label": `${main.words()}: ${name}`,
            onclick: () => run(main, name),
            onpointerenter: (event) => explain(event.currentTarget, main, name),
            onfocus: (event) => explain(event.currentTarget, main, name),
          },
          main.words(),
        ),
        h(
          "button.button.is-plain",
          {
            type: "button",
            "data-focus": `more ${name}`,
            "aria-haspopup": "menu",
            "aria-label": _("More for {model}", { model: name }),
            onclick: (event) => openMenu(event.currentTarget, name),
          },
          icon("more"),
        ),
      ),
    ),
  );
}

/** Says, before somebody presses it, what would make way. */
async function explain(button, action, name) {
  if (action.name !== "serve") return;
  try {
    const [words] = await wayWords(name);
    button.title = words;
    button.setAttribute("aria-description", words);
  } catch {
    button.title = ""; // pressing it will say what is wrong
  }
}

function openMenu(button, name) {
  document.querySelector(".menu")?.remove();
  const model = modelOf(name);
  if (!model) return;
  const fitting = ACTIONS.filter((each) => !["serve", "park"].includes(each.name) && each.suits(model, name));
  const reasons = new Set(fitting.map((each) => whyNot(each.right)).filter(Boolean));
  const items = fitting.map((each) => {
    const why = whyNot(each.right);
    return h(
      `button${each.asks ? ".bad" : ""}`,
      {
        type: "button",
        role: "menuitem",
        tabIndex: -1,
        "aria-disabled": why ? "true" : null,
        title: why,
        onclick: () => {
          if (!why) {
            menu.hidePopover();
            run(each, name);
          }
        },
      },
      each.words(),
    );
  });
  const menu = h(
    "div.menu",
    {
      role: "menu",
      "aria-label": name,
      popover: "auto",
      onkeydown: arrows,
      ontoggle: (event) => {
        if (event.newState === "closed") {
          menu.remove();
          if (!document.activeElement || document.activeElement === document.body) button.focus();
        }
      },
    },
    items,
    [...reasons].map((why) => h("p", { role: "note" }, why)),
  );
  document.body.append(menu);
  menu.showPopover();
  const at = button.getBoundingClientRect();
  const { width, height } = menu.getBoundingClientRect();
  menu.style.setProperty("left", `${Math.max(8, Math.min(at.right - width, innerWidth - width - 8))}px`);
  menu.style.setProperty(
    "top",
    `${at.bottom + height + 8 > innerHeight ? Math.max(8, at.top - height - 4) : at.bottom + 4}px`,
  );
  items[0]?.focus();

  function arrows(event) {
    const index = items.indexOf(document.activeElement);
    const to = {
      ArrowDown: (index + 1) % items.length,
      ArrowUp: (index - 1 + items.length) % items.length,
      Home: 0,
      End: items.length - 1,
    }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      items[to].focus();
    } else if (event.key === "Tab") menu.hidePopover();
  }
}
