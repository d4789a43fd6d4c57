// SPDX-License-Identifier: Apache-2.0
// What serves, and the form that has another model serve.

import { ACTIONS, isBusy, run, wayWords } from "./actions.js";
import { h, renew } from "./dom.js";
import { now } from "./server.js";
import { _, many } from "./words.js";

const ASK_MS = 120;

/** Why nothing serves. */
export function resting() {
  const name = now.state.daemon.resting;
  return name
    ? _("{model} rests: the next request wakes it.", { model: name })
    : _("No model serves: the first request for one has it loaded.");
}

/** A model that serves. */
export function servingCard(name, model, engine) {
  const park = ACTIONS.find((each) => each.name === "park");
  const requests = [
    many("{count} request", "{count} requests", model.answering),
    model.waiting ? many("{count} waits", "{count} wait", model.waiting) : "",
  ].filter(Boolean);
  return h(
    "div.card",
    { role: "listitem" },
    h(
      "div.grow",
      {},
      h("div.row", {}, h("span.name", {}, name), now.state.daemon.active === name && h("span.tag", {}, _("active"))),
      h("div.dim.small", {}, [engine?.kind, ...requests].filter(Boolean).join(" · ")),
    ),
    h(
      "button.button",
      {
        type: "button",
        disabled: isBusy(name),
        onclick: () => run(park, name),
        "data-focus": `park ${name}`,
        "aria-label": _("Park {model}", { model: name }),
      },
      park.words(),
    ),
  );
}

/** Chooses a model that is to serve, and says before what would make way. */
export function switcher() {
  const names = h("datalist", { id: "switch-names" });
  const field = h("input.field", {
    list: "switch-names",
    id: "switch-to",
    autocomplete: "off",
    spellcheck: false,
    placeholder: _("Name of a model"),
    "aria-describedby": "switch-hint",
  });
  const button = h("button.button.is-main", { type: "submit" }, _("Serve"));
  const hint = h(
    "p.hint.dim.small",
    { id: "switch-hint", role: "status" },
    _("It serves beside the others if there is room; otherwise idle models make way."),
  );
  const usual = hint.textContent;
  let timer = 0;
  const form = h(
    "form.card.switch",
    { onsubmit: submit },
    h("label", { for: "switch-to" }, _("Switch to")),
    field,
    names,
    button,
    hint,
  );

  field.addEventListener("focus", fill);
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(look, ASK_MS);
  });

  function fill() {
    const wanted = Object.keys(now.state?.models ?? {}).sort();
    renew(
      names,
      wanted.join("\n"),
      wanted.map((name) => h("option", { value: name })),
    );
  }

  async function look() {
    const name = field.value.trim();
    if (!now.state || !Object.hasOwn(now.state.models, name)) {
      hint.textContent = usual;
      return;
    }
    try {
      const [words] = await wayWords(name);
      if (field.value.trim() === name) hint.textContent = words || _("{model} serves already.", { model: name });
    } catch (error) {
      hint.textContent = error.message;
    }
  }

  async function submit(event) {
    event.preventDefault();
    const name = field.value.trim();
    if (!name) return field.focus();
    button.disabled = true;
    hint.textContent = _("{model} is loaded …", { model: name });
    const isDone = await run(ACTIONS[0], name);
    button.disabled = false;
    hint.textContent = usual;
    if (isDone) field.value = "";
  }

  return form;
}
