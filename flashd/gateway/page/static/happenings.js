// SPDX-License-Identifier: Apache-2.0
// What happened: jobs that have ended and requests that were answered, as spans of time, and as a trace.

import { h } from "./dom.js";
import { now } from "./server.js";
import { _, seconds } from "./words.js";

export const ENDS = new Set(["done", "failed", "cancelled"]);
export const SWAPS = new Set(["swap", "serve"]);

/** Words for a job's kind. */
export function words(kind) {
  const known = {
    swap: _("swap"),
    serve: _("serve"),
    load: _("load"),
    pull: _("pull"),
    import: _("import"),
    park: _("park"),
    verify: _("verify"),
    scrub: _("scrub"),
    install: _("install"),
    "warm-up": _("warm-up"),
  };
  return known[kind] ?? kind;
}

/** Everything that has ended, in the order of its beginning, each with the spans that it is drawn as. */
export function happenings() {
  const found = [];
  for (const [key, job] of Object.entries(now.state.jobs)) {
    if (!ENDS.has(job.state) || !job.finished_at) continue;
    const isSwap = SWAPS.has(job.kind);
    const kind = job.state === "failed" ? "bad" : job.state === "cancelled" ? "more" : "serving";
    const title = `${words(job.kind)} ${job.subject}: ${seconds(job.finished_at - job.created_at)}`;
    found.push({
      key: `job ${key}`,
      group: isSwap ? "swaps" : "jobs",
      model: job.subject,
      begin: job.created_at,
      end: job.finished_at,
      job,
      version: job.state,
      spans: [{ begin: job.created_at, end: job.finished_at, kind, title }],
    });
  }
  for (const [key, request] of Object.entries(now.state.requests)) {
    const { arrived_at: begin, wait_s: wait, first_byte_s: first, seconds: took } = request;
    const answered = first || took;
    const title = `${request.endpoint} ${request.model}: ${seconds(took)}`;
    const spans = [
      { begin, end: begin + Math.min(wait, took), kind: "cache", title },
      { begin: begin + wait, end: begin + answered, kind: request.status >= 400 ? "bad" : "engine", title },
      { begin: begin + answered, end: begin + took, kind: request.status >= 400 ? "bad" : "idle", title },
    ].filter((span) => span.end > span.begin);
    found.push({
      key: `request ${key}`,
      group: "requests",
      model: request.model,
      begin,
      end: begin + took,
      request,
      version: "",
      spans,
    });
  }
  return found.sort((a, b) => a.begin - b.begin);
}

/** Saves what is known in Chrome's trace format, which Perfetto and about:tracing open. */
export function download() {
  const traceEvents = [];
  const lanes = new Map();
  for (const each of happenings()) {
    if (!lanes.has(each.model)) {
      lanes.set(each.model, lanes.size + 1);
      traceEvents.push({ ph: "M", name: "thread_name", pid: 1, tid: lanes.size, args: { name: each.model } });
    }
    const lane = { pid: 1, tid: lanes.get(each.model), cat: each.group };
    const about = each.job ?? each.request;
    traceEvents.push({
      ...lane,
      ph: "X",
      name: each.job ? `${each.job.kind} ${each.model}` : each.request.endpoint,
      ts: each.begin * 1e6,
      dur: (each.end - each.begin) * 1e6,
      args: about,
    });
    let begin = each.begin;
    for (const [phase, took] of Object.entries(each.job?.phases ?? {})) {
      traceEvents.push({ ...lane, ph: "X", name: phase, ts: begin * 1e6, dur: took * 1e6 });
      begin += took;
    }
  }
  const address = URL.createObjectURL(
    new Blob([JSON.stringify({ traceEvents, displayTimeUnit: "ms" })], { type: "application/json" }),
  );
  h("a", {
    href: address,
    download: `flashd-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.json`,
  }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
