// SPDX-License-Identifier: Apache-2.0
// Speaks to the gateway: the state of the machine, kept up to date by server-sent events, and changes.

const RETRY_MS = [200, 500, 1000, 2000, 5000];
const SHORT_MS = 5000; // a stream that ends sooner is no good one
const TOKEN = "flashd-token";

/** An answer that is an error: what happened, and what to do about it. */
export class Refusal extends Error {
  constructor(status, { name = "", message = "", hint = "" }) {
    super(message);
    this.status = status;
    this.name = name;
    this.hint = hint;
  }
}

/** The state as it is now; null until it is known. `isLive` is whether changes come. */
export const now = { state: null, isLive: false, needsToken: false, offsetS: 0 };
const listeners = new Set();

/** Calls a function after each change, at most once a frame. */
export function onChange(listener) {
  listeners.add(listener);
}

let isPending = false;
/** Has everything that shows the state look again. */
export function changed() {
  if (isPending) return;
  isPending = true;
  const tell = () => {
    isPending = false;
    listeners.forEach((listener) => listener());
  };
  // A page in the background has no frames.
  if (document.hidden) setTimeout(tell, 250);
  else requestAnimationFrame(tell);
}

export function hasToken() {
  return Boolean(sessionStorage.getItem(TOKEN));
}

export function setToken(token) {
  if (token) sessionStorage.setItem(TOKEN, token);
  else sessionStorage.removeItem(TOKEN);
}

/** Asks the gateway. Throws a Refusal for an answer that is an error. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { name: "Unavailable", message: "the gateway does not answer" });
  }
  if (answer.ok) return answer;
  let said = {};
  try {
    said = (await answer.json()).error ?? {};
  } catch {
    said = { message: answer.statusText };
  }
  throw new Refusal(answer.status, { ...said, name: said.name ?? said.code ?? "" });
}

export async function get(path) {
  return (await ask(path)).json();
}

/** Has the gateway change something: see flashd/gateway/page/actions.py. */
export async function act(action, fields, signal) {
  const headers = { "content-type": "application/json", "x-flashd-page": "1" };
  const options = { method: "POST", headers, body: JSON.stringify(fields), signal };
  return (await ask(`/flashd/v1/actions/${encodeURIComponent(action)}`, options)).json();
}

/** The model of this name, as it is now; undefined if there is none. A name may be that of a property of all objects. */
export function modelOf(name) {
  const models = now.state?.models ?? {};
  return Object.hasOwn(models, name) ? models[name] : undefined;
}

/** Yields the events of a stream, as [kind, data]; comments are of the kind "comment". */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const parts = text.split(/\r?\n\r?\n/);
      text = parts.pop();
      for (const part of parts) {
        let kind = "message";
        const data = [];
        for (const line of part.split(/\r?\n/)) {
          if (line.startsWith(": ")) yield ["comment", line.slice(2)];
          else if (line.startsWith("event: ")) kind = line.slice(7);
          else if (line.startsWith("data: ")) data.push(line.slice(6));
        }
        if (data.length) yield [kind, data.join("\n")];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Applies a merge patch (RFC 7396). What it does not touch stays the same object. */
export function merged(value, patch) {
  if (typeof patch !== "object" || patch === null || Array.isArray(patch)) return patch;
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  const result = Object.assign(Object.create(null), isObject ? value : {}); // a name may be __proto__
  for (const [name, part] of Object.entries(patch)) {
    if (part === null) delete result[name];
    else result[name] = merged(Object.hasOwn(result, name) ? result[name] : undefined, part);
  }
  return result;
}

/** Follows the state for as long as the page lives. */
export async function follow() {
  let attempt = 0;
  for (;;) {
    const began = performance.now();
    try {
      const answer = await ask("/flashd/v1/events");
      now.needsToken = false;
      for await (const [kind, data] of events(answer)) {
        const said = JSON.parse(data);
        if (kind === "state") {
          now.state = said;
          now.isLive = true;
        } else if (kind === "change") {
          now.state = merged(now.state, said);
        }
        changed();
      }
      if (performance.now() - began > SHORT_MS) {
        attempt = 0; // it ended well, as each stream does after some minutes
        continue;
      }
    } catch (error) {
      now.needsToken = error.status === 401;
    }
    now.isLive = false;
    changed();
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(attempt++, RETRY_MS.length - 1)]));
  }
}
