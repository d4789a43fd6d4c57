// SPDX-License-Identifier: Apache-2.0
// The frame of the page: the views, which of them is shown, and whether the machine is heard of.

import { activity } from "./activity.js";
import { notes } from "./actions.js";
import { chat } from "./chat.js";
import { h, icon, renew } from "./dom.js";
import { memory } from "./memory.js";
import { models } from "./models.js";
import { follow, now, onChange, setToken } from "./server.js";
import { settings } from "./settings.js";
import { _, load, many } from "./words.js";

await load();

const VIEWS = {
  memory: [_("Memory"), memory],
  models: [_("Models"), models],
  activity: [_("Activity"), activity],
  chat: [_("Chat"), chat],
  settings: [_("Settings"), settings],
};
const made = {};
const main = h("main", { id: "main", tabIndex: -1 });
const banners = h("div", { role: "status" });
const link = h("div.link", { role: "status" });
const tabs = Object.entries(VIEWS).map(([name, [title]]) =>
  h("a", { href: `#${name}` }, icon(name), h("span", {}, title)),
);

document.body.replaceChildren(
  h("a.skip", { href: "#main", onclick: skip }, _("To the content")),
  h(
    "header.top",
    {},
    h("div.brand", {}, h("img", { src: new URL("icon.svg", import.meta.url).href, alt: "" }), h("h1", {}, "flashd")),
    h("nav.views", { "aria-label": _("Views") }, tabs),
    link,
  ),
  main,
  notes,
);
main.append(banners);

function skip(event) {
  event.preventDefault();
  main.focus();
}

function current() {
  const name = location.hash.slice(1).split("?")[0];
  return Object.hasOwn(VIEWS, name) ? name : "memory";
}

function show() {
  const name = current();
  for (const tab of tabs) {
    if (tab.hash === `#${name}`) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[name][0]} – flashd`;
  made[name] ??= VIEWS[name][1]();
  const shown = made[name].element;
  shown.classList.add("view");
  if (shown.parentNode !== main) {
    main.replaceChildren(banners, shown);
  }
  update();
}

function update() {
  const { state, isLive, needsToken } = now;
  const isConnected = Boolean(isLive && state?.daemon.connected);
  const problems = state?.daemon.problems ?? [];
  const words = needsToken
    ? _("A token is needed")
    : !isLive
      ? state
        ? _("The gateway does not answer")
        : _("Connecting …")
      : isConnected
        ? many("{count} model", "{count} models", Object.keys(state.models).length)
        : _("flashd does not run");
  renew(link, words + isConnected, h(`span.dot.${isConnected ? "is-good" : "is-bad"}`), h("span", {}, words));
  renew(banners, JSON.stringify([isLive, isConnected, needsToken, problems, Boolean(state)]), [
    needsToken && (() => tokenForm()),
    state &&
      !needsToken &&
      !isConnected &&
      (() =>
        h(
          "p.banner",
          {},
          isLive
            ? _("flashd does not run. What you see is what was so last. Start it with flash start.")
            : _("The gateway does not answer. What you see is what was so last."),
        )),
    ...problems.map((each) => () => h("p.banner", {}, h("strong", {}, each.what), " ", each.remedy)),
  ]);
  if (state) made[current()]?.update();
}

function tokenForm() {
  const field = h("input.field.grow", { type: "password", name: "token", autocomplete: "off", required: true });
  const submit = (event) => {
    event.preventDefault();
    setToken(field.value.trim());
    location.reload();
  };
  return h(
    "form.card",
    { onsubmit: submit },
    h("p", {}, _("Other machines need a token. Make one where flashd runs: flash token new NAME")),
    h(
      "label.row.wrap",
      {},
      h("span", {}, _("Token")),
      field,
      h("button.button.is-main", { type: "submit" }, _("Use it")),
    ),
  );
}

addEventListener("hashchange", () => {
  show();
  main.focus({ preventScroll: true });
  scrollTo(0, 0);
});
onChange(update);
show();
follow();
