// SPDX-License-Identifier: Apache-2.0
// Makes elements. Text is only ever set as text, so that no name can become markup.

/**
 * Makes an element: h("p.dim", {title: "…"}, "text", another element, …). Properties that begin with "on" are handlers,
 * those with a dash and `role` attributes, the others properties. Children that are null or false are left out.
 */
export function h(what, properties, ...children) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([key, given]) => element.style.setProperty(key, given));
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.includes("-") || name === "role" || name === "list" || name === "for")
      element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== false && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  memory: "M4 7h16v10H4zM8 7v10M12 7v10M16 7v10",
  models: "M4 6h16M4 12h16M4 18h16",
  activity: "M3 12h4l3-7 4 14 3-7h4",
  chat: "M4 5h16v11H10l-4 4v-4H4z",
  settings: "M5 7h9M18 7h1M5 17h1M10 17h9M14 5v4M6 15v4",
  pin: "M9 4h6l-1 6 3 3H7l3-3zM12 13v7",
  lock: "M6 11h12v9H6zM9 11V8a3 3 0 0 1 6 0v3",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  close: "M6 6l12 12M18 6 6 18",
  copy: "M9 9h10v11H9zM5 15V4h10",
};

/** A line drawing, which says nothing to a screen reader. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("class", "icon");
  drawing.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  drawing.append(path);
  return drawing;
}

/**
 * Makes the children of an element those of a list of [key, make, version], and reuses what it made for a key while the
 * version is the same: focus and scroll positions stay.
 */
export function keep(parent, wanted) {
  const known = (parent.kept ??= new Map());
  const keys = new Set(wanted.map(([key]) => key));
  for (const [key, { element }] of known) {
    if (!keys.has(key)) {
      element.remove();
      known.delete(key);
    }
  }
  let before = parent.firstChild;
  for (const [key, make, version] of wanted) {
    let found = known.get(key);
    if (!found || found.version !== version) {
      const element = make(found?.element);
      if (found && found.element !== element) {
        const had = focusIn(found.element);
        if (before === found.element) before = found.element.nextSibling;
        found.element.replaceWith(element);
        refocus(element, had);
      }
      found = { element, version };
      known.set(key, found);
    }
    if (found.element === before) before = before.nextSibling;
    else parent.insertBefore(found.element, before);
  }
}

/** Replaces the children of an element, unless they were made of the same facts. */
export function renew(parent, version, ...children) {
  if (parent.madeOf === version) return;
  parent.madeOf = version;
  const had = focusIn(parent);
  parent.replaceChildren(
    ...children
      .flat()
      .filter(Boolean)
      .map((child) => (typeof child === "function" ? child() : child)),
  );
  refocus(parent, had);
}

// Elements that can be focused have a name in data-focus, by which what replaces them is found.
function focusIn(element) {
  return element.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
}

function refocus(element, name) {
  if (name === undefined) return;
  for (const each of element.querySelectorAll("[data-focus]")) if (each.dataset.focus === name) return each.focus();
}
