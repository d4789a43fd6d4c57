// SPDX-License-Identifier: Apache-2.0
// What a person does to models: which actions there are, what they would cost, and what became of them.

import { h, icon } from "./dom.js";
import { act, get, modelOf, now } from "./server.js";
import { _, seconds } from "./words.js";

const CLOSE_MS = 5000;

/** Where notes are shown. A screen reader reads each new one. */
export const notes = h("div.notes", { role: "log", "aria-live": "polite", "aria-label": _("Notes") });

/** Shows what happened; what went wrong stays until it is closed. */
export function note(text, hint = "", isBad = false) {
  const close = () => shown.remove();
  const shown = h(
    `div.note${isBad ? ".is-bad" : ""}`,
    {},
    h("div.grow", {}, h("p", {}, text), hint && h("p.dim", {}, hint)),
    h("button.button.is-plain", { type: "button", "aria-label": _("Close"), onclick: close }, icon("close")),
  );
  notes.append(shown);
  while (notes.childElementCount > 4) notes.firstChild.remove();
  if (!isBad) setTimeout(close, CLOSE_MS);
  return close;
}

/** Shows an error of the gateway or the daemon. */
export function complain(error, about = "") {
  if (error.name === "AbortError") return;
  note(about ? `${about}: ${error.message}` : error.message, error.hint ?? "", true);
}

/** Why the visitor may not do something, with the remedy; empty if it may be done. */
export function whyNot(right) {
  return right ? (now.state?.rights[right] ?? "") : "";
}

/** Actions on a model: name, words, the right they need, and whether they make sense for a model as it is. */
export const ACTIONS = [
  { name: "serve", words: () => _("Serve"), right: "", suits: (model) => !model.serving },
  { name: "park", words: () => _("Park"), right: "", suits: (model) => model.serving },
  {
    name: "swap",
    words: () => _("Make it the active model"),
    right: "memory",
    suits: (model, name) => now.state.daemon.active !== name,
  },
  {
    name: "load",
    words: () => _("Load into host memory"),
    right: "memory",
    fields: { tier: "host" },
    suits: (model) => !model.devices.includes("host"),
  },
  {
    name: "load",
    words: () => _("Load into GPU memory"),
    right: "memory",
    fields: { tier: "device" },
    suits: (model) => model.residency !== "device" && hasGpu(),
  },
  {
    name: "evict",
    words: () => _("Evict from memory"),
    right: "memory",
    suits: (model) => model.residency !== "stored" && !model.serving,
  },
  { name: "pin", words: () => _("Pin"), right: "models", suits: (model) => !model.pinned },
  { name: "unpin", words: () => _("Unpin"), right: "models", suits: (model) => model.pinned },
  { name: "make-private", words: () => _("Make private"), right: "models", suits: (model) => !model.private },
  { name: "make-public", words: () => _("Make public"), right: "models", suits: (model) => model.private },
  { name: "remove", words: () => _("Remove …"), right: "models", suits: () => true, asks: true },
];

function hasGpu() {
  return now.state.tiers.some((tier) => tier.kind !== "host" && tier.kind !== "store");
}

const working = new Set();

/** Tells whether an action on a model that was begun here is in progress. */
export function isBusy(name) {
  return working.has(name);
}

/** Does something to a model, and says what became of it. Returns whether it was done. */
export async function run(action, name) {
  if (
    action.asks &&
    !(await confirmed(
      _("Remove {model}?", { model: name }),
      _("Its checkpoint is deleted as soon as nothing uses it."),
      _("Remove"),
    ))
  )
    return false;
  working.add(name);
  document.dispatchEvent(new Event("busy"));
  const began = performance.now();
  try {
    await act(action.name, { model: name, ...action.fields });
    const took = seconds((performance.now() - began) / 1000);
    if (action.name === "serve") note(_("{model} serves, after {time}", { model: name, time: took }));
    else note(`${action.words()}: ${name}`);
    return true;
  } catch (error) {
    complain(error, name);
    return false;
  } finally {
    working.delete(name);
    document.dispatchEvent(new Event("busy"));
  }
}

/** Asks whether something is meant. */
export function confirmed(question, more, word) {
  return new Promise((resolve) => {
    const dialog = h(
      "dialog",
      {
        "aria-labelledby": "question",
        onclose: () => {
          dialog.remove();
          resolve(dialog.returnValue === "yes");
        },
      },
      h(
        "form",
        { method: "dialog" },
        h("h2", { id: "question" }, question),
        h("p.dim", {}, more),
        h(
          "div.row",
          {},
          h("button.button", { value: "no", autofocus: true }, _("Cancel")),
          h("button.button.is-bad", { value: "yes" }, word),
        ),
      ),
    );
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Asks for a text; null if none is given. */
export function asked(question, more, label, placeholder, word) {
  return new Promise((resolve) => {
    const field = h("input.field", {
      name: "text",
      placeholder,
      required: true,
      autocomplete: "off",
      spellcheck: false,
      maxLength: 200,
    });
    const dialog = h(
      "dialog",
      {
        "aria-labelledby": "question",
        onclose: () => {
          dialog.remove();
          resolve(dialog.returnValue === "yes" ? field.value.trim() : null);
        },
      },
      h(
        "form",
        { method: "dialog" },
        h("h2", { id: "question" }, question),
        h("p.dim", {}, more),
        h("label", {}, h("span", {}, label), field),
        h(
          "div.row",
          {},
          h("button.button", { value: "no", type: "button", onclick: () => dialog.close("no") }, _("Cancel")),
          h("button.button.is-main", { value: "yes" }, word),
        ),
      ),
    );
    document.body.append(dialog);
    dialog.showModal();
    field.focus();
  });
}

const FRESH_MS = 1500;
const displaced = new Map();

/** The models that would make way for one; known answers are used again for a moment. */
export async function wouldDisplace(name) {
  const known = displaced.get(name);
  if (known && performance.now() - known.at < FRESH_MS) return known.models;
  const { models } = await get(`/flashd/v1/would-displace?model=${encodeURIComponent(name)}`);
  if (displaced.size > 100) displaced.clear();
  displaced.set(name, { at: performance.now(), models });
  return models;
}

/** Says in a sentence what would make way for a model; empty if it serves already. */
export async function wayWords(name) {
  const model = modelOf(name);
  if (!model || model.serving) return ["", []];
  const names = await wouldDisplace(name);
  if (!names.length) return [_("There is room for {model}: nothing would make way.", { model: name }), names];
  return [_("For {model}, these would make way: {others}", { model: name, others: names.join(", ") }), names];
}
