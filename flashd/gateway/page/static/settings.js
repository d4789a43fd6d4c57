// SPDX-License-Identifier: Apache-2.0
// Settings: what they are, read only, with the command that changes each; and those of this page itself.

import { complain, note } from "./actions.js";
import { h, icon, renew } from "./dom.js";
import { get, hasToken, now, setToken } from "./server.js";
import { LANGUAGES, _, choose, chosen, many } from "./words.js";

export function settings() {
  let all = [];
  let text = "";
  let wasConnected = false;
  const filter = h("input.field.filter", {
    type: "search",
    placeholder: _("Filter by name or meaning"),
    "aria-label": _("Filter"),
    spellcheck: false,
    oninput: () => {
      text = filter.value.toLowerCase();
      list();
    },
  });
  const isChanged = h("input", { type: "checkbox", onchange: () => list() });
  const sections = h("div.view");
  const count = h("p.dim.small", { role: "status" });
  const why = h("p.dim.small");
  const languages = h(
    "select.field",
    { id: "language", onchange: (event) => choose(event.target.value) },
    h("option", { value: "" }, _("as the browser")),
    Object.entries(LANGUAGES).map(([tag, name]) =>
      h("option", { value: tag, lang: tag, selected: chosen() === tag }, name),
    ),
  );
  const element = h(
    "div",
    {},
    h(
      "section.card",
      { "aria-labelledby": "page-settings" },
      h(
        "div.row.wrap",
        {},
        h("h2.grow", { id: "page-settings" }, _("This page")),
        h("label.row", { for: "language" }, _("Language"), languages),
        h(
          "button.button",
          {
            type: "button",
            hidden: !hasToken(),
            onclick: () => {
              setToken("");
              location.reload();
            },
          },
          _("Forget the token"),
        ),
      ),
      why,
    ),
    h("div.tools", {}, filter, h("label.row", {}, isChanged, _("Only what differs from its default"))),
    count,
    sections,
  );

  async function load() {
    try {
      all = (await get("/flashd/v1/settings")).settings;
      list();
    } catch (error) {
      complain(error, _("Settings"));
    }
  }

  function list() {
    const found = all.filter(
      (each) =>
        (!isChanged.checked || each.value !== each.default) &&
        (!text || `${each.key} ${each.meaning}`.toLowerCase().includes(text)),
    );
    const groups = new Map();
    for (const each of found) {
      const section = each.key.startsWith("models.") ? "models" : each.key.split(".").slice(0, -1).join(".");
      if (!groups.has(section)) groups.set(section, []);
      groups.get(section).push(each);
    }
    count.textContent = many("{count} setting", "{count} settings", found.length);
    sections.replaceChildren(
      ...[...groups].map(([section, those]) =>
        h(
          "section.card.is-flush",
          { "aria-labelledby": `s-${section}` },
          h("h3.section", { id: `s-${section}` }, section),
          h("dl.settings", {}, those.map(entry)),
        ),
      ),
    );
  }

  function update() {
    const { daemon } = now.state;
    if (daemon.connected && !wasConnected) load(); // also when it comes back, perhaps with other settings
    wasConnected = daemon.connected;
    renew(
      why,
      JSON.stringify([daemon.version, daemon.default_engine, daemon.default_engine_reason]),
      [
        `flashd ${daemon.version}`,
        daemon.default_engine
          ? ` · ${_("{engine} is the default engine", { engine: daemon.default_engine })}: ${daemon.default_engine_reason}`
          : "",
      ].join(""),
    );
  }

  return { element, update };
}

function entry(setting) {
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(setting.command);
      note(_("Copied: {command}", { command: setting.command }));
    } catch {
      note(setting.command); // a page that came by plain HTTP from another machine has no clipboard
    }
  };
  const isDefault = setting.value === setting.default;
  return h(
    "div",
    {},
    h(
      "dt",
      {},
      h("code", {}, setting.key),
      setting.restart && h("span.tag", { title: _("A change takes effect after flash restart") }, _("restart")),
    ),
    h(
      "dd",
      {},
      h(`code.value${isDefault ? ".dim" : ""}`, {}, setting.value === "" ? "“”" : setting.value),
      !isDefault &&
        setting.value !== "(hidden)" &&
        h("span.dim.small", {}, _("default: {value}", { value: setting.default === "" ? "“”" : setting.default })),
      h("p.dim.small", {}, setting.meaning),
    ),
    h(
      "dd.copy",
      {},
      h(
        "button.button.is-plain",
        {
          type: "button",
          title: setting.command,
          "aria-label": _("Copy the command that changes {setting}", { setting: setting.key }),
          onclick: copy,
        },
        icon("copy"),
      ),
    ),
  );
}
