// SPDX-License-Identifier: Apache-2.0
// The language of the page. A catalogue is a JSON object from English sentences to their translations, which is served
// as it is, so that installing the page needs no build step; tests/unit/test_page_words.py compares it with the code.

export const LANGUAGES = { en: "English", de: "Deutsch", zh: "简体中文" };
const CHOICE = "flashd-language";
let catalogue = {};
export let language = "en";

/** Loads the language that was chosen, else the first of the browser's that there is. */
export async function load() {
  const wanted = [localStorage.getItem(CHOICE), ...navigator.languages].filter(Boolean);
  language = wanted.map((tag) => tag.toLowerCase().split("-")[0]).find((tag) => tag in LANGUAGES) ?? "en";
  document.documentElement.lang = language === "zh" ? "zh-Hans" : language;
  if (language !== "en") catalogue = await (await fetch(new URL(`words.${language}.json`, import.meta.url))).json();
}

export function choose(tag) {
  if (tag) localStorage.setItem(CHOICE, tag);
  else localStorage.removeItem(CHOICE);
  location.reload();
}

export function chosen() {
  return localStorage.getItem(CHOICE) ?? "";
}

/** Translates a sentence, and inserts values for each {name} in it. */
export function _(sentence, values) {
  const said = Object.hasOwn(catalogue, sentence) ? catalogue[sentence] : sentence;
  return values
    ? said.replace(/\{(\w+)\}/g, (whole, name) => (Object.hasOwn(values, name) ? String(values[name]) : whole))
    : said;
}

/** Translates with a plural; {count} stands for the number. */
export function many(one, more, count, values) {
  return _(count === 1 ? one : more, { count: number(count), ...values });
}

export function number(value, digits = 0) {
  return value.toLocaleString(language, { maximumFractionDigits: digits });
}

/** A size in decimal units with three significant digits, as flash writes it. */
export function bytes(size) {
  if (size < 999.5) return `${number(size)} B`;
  let value = size;
  for (const unit of ["kB", "MB", "GB", "TB"]) {
    value /= 1000;
    if (value < 999.5 || unit === "TB")
      return `${value.toLocaleString(language, { maximumSignificantDigits: 3 })} ${unit}`;
  }
}

/** A duration with as many digits as say something. */
export function seconds(value) {
  if (value < 0.0095) return `${number(value * 1000, 1)} ms`;
  if (value < 0.9995) return `${number(value * 1000)} ms`;
  if (value < 60) return `${number(value, value < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${String(Math.floor(value % 60)).padStart(2, "0")} s`;
}

/** How long ago something was. */
export function ago(time) {
  if (!time) return _("never");
  const passed = Math.max(0, Date.now() / 1000 - time);
  const relative = new Intl.RelativeTimeFormat(language, { style: "short", numeric: "auto" });
  if (passed < 45) return _("just now");
  if (passed < 3600) return relative.format(-Math.round(passed / 60), "minute");
  if (passed < 86400) return relative.format(-Math.round(passed / 3600), "hour");
  return relative.format(-Math.round(passed / 86400), "day");
}

export function clock(time) {
  return new Date(time * 1000).toLocaleTimeString(language, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}
