// SPDX-License-Identifier: Apache-2.0
// Chat: one model, or two side by side with the same questions. Nothing is kept, here or at the gateway.

import { complain } from "./actions.js";
import { h, renew } from "./dom.js";
import { SWAPS } from "./happenings.js";
import { ask, events, modelOf, now } from "./server.js";
import { _, many, number, seconds } from "./words.js";

const MOST_IMAGE_BYTES = 8e6;

export function chat() {
  const names = h("datalist", { id: "chat-names" });
  const sides = [side(0), side(1)];
  const columns = h("div.columns", {}, sides[0].element);
  const system = h("textarea.field", { rows: 2, id: "system", spellcheck: false });
  const parameters = Object.fromEntries(
    [
      ["temperature", { min: 0, max: 2, step: 0.1 }],
      ["top_p", { min: 0.01, max: 1, step: 0.01 }],
      ["max_tokens", { min: 1, step: 1, value: 512 }],
      ["seed", { min: 0, step: 1 }],
    ].map(([name, given]) => [
      name,
      h("input.field", { type: "number", id: `p-${name}`, inputMode: "decimal", ...given }),
    ]),
  );
  const question = h("textarea.field.grow", {
    rows: 2,
    id: "question",
    placeholder: _("Ask something"),
    "aria-label": _("Question"),
    onkeydown: keys,
  });
  const send = h("button.button.is-main", { type: "submit" }, _("Send"));
  const stop = h(
    "button.button",
    { type: "button", hidden: true, onclick: () => sides.forEach((each) => each.stop()) },
    _("Stop"),
  );
  const image = h("input", {
    type: "file",
    accept: "image/png,image/jpeg,image/webp",
    id: "image",
    "aria-label": _("Picture"),
  });
  const imageRow = h("label.row.small", { for: "image" }, _("Picture"), image);
  const both = h("button.button", { type: "button", "aria-pressed": "false", onclick: toggle }, _("Compare two"));
  const clear = h(
    "button.button.is-plain",
    { type: "button", onclick: () => sides.forEach((each) => each.clear()) },
    _("Clear"),
  );
  const element = h(
    "div.chat",
    {},
    h("div.tools", {}, both, clear),
    columns,
    h(
      "form.card.composer",
      { onsubmit: submit },
      h("div.row", {}, question, h("div.sends", {}, send, stop)),
      imageRow,
      h(
        "details",
        {},
        h("summary", {}, _("System prompt and parameters")),
        h(
          "div.parameters",
          {},
          h("label.is-wide", { for: "system" }, _("System prompt"), system),
          Object.entries(parameters).map(([name, field]) =>
            h("label", { for: `p-${name}` }, h("code", {}, name), field),
          ),
        ),
      ),
    ),
    names,
  );

  function toggle() {
    const isOn = !sides[1].element.isConnected;
    both.setAttribute("aria-pressed", String(isOn));
    both.classList.toggle("is-main", isOn);
    columns.classList.toggle("has-two", isOn);
    if (isOn) columns.append(sides[1].element);
    else {
      sides[1].stop();
      sides[1].element.remove();
    }
    update();
  }

  function keys(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      event.target.form.requestSubmit();
    }
  }

  async function submit(event) {
    event.preventDefault();
    const text = question.value.trim();
    const shown = sides.filter((each) => each.element.isConnected);
    if (!text || shown.some((each) => each.isBusy)) return;
    const body = {};
    for (const [name, field] of Object.entries(parameters)) if (field.value !== "") body[name] = Number(field.value);
    let picture = null;
    try {
      if (!imageRow.hidden && image.files[0]) picture = await read(image.files[0]);
    } catch (error) {
      return complain(error);
    }
    question.value = "";
    image.value = "";
    send.disabled = true;
    stop.hidden = false;
    await Promise.all(shown.map((each) => each.say(text, system.value.trim(), body, picture)));
    send.disabled = false;
    stop.hidden = true;
    question.focus();
  }

  function update() {
    const all = Object.entries(now.state.models).filter(
      ([, model]) => !model.capabilities.length || model.capabilities.includes("completion"),
    );
    const wanted = all.flatMap(([name, model]) => [name, ...model.adapters]).sort();
    renew(
      names,
      wanted.join("\n"),
      wanted.map((name) => h("option", { value: name })),
    );
    const serving = all
      .filter(([, model]) => model.serving)
      .map(([name]) => name)
      .sort();
    sides[0].suggest(now.state.daemon.active || serving[0] || wanted[0] || "");
    sides[1].suggest(
      serving.find((name) => name !== sides[0].name()) ?? wanted.find((name) => name !== sides[0].name()) ?? "",
    );
    const sees = sides.some(
      (each) => each.element.isConnected && modelOf(each.name())?.capabilities.includes("vision"),
    );
    imageRow.hidden = !sees;
  }

  return { element, update };
}

function read(file) {
  if (file.size > MOST_IMAGE_BYTES)
    throw new Error(_("The picture is larger than {size} MB.", { size: number(MOST_IMAGE_BYTES / 1e6) }));
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** A conversation with one model. */
function side(index) {
  const field = h("input.field.grow", {
    list: "chat-names",
    id: `chat-model-${index}`,
    autocomplete: "off",
    spellcheck: false,
    oninput: () => {
      isChosen = true;
    },
  });
  const log = h("div.log", {
    role: "log",
    "aria-live": "polite",
    "aria-busy": "false",
    tabIndex: 0,
    "aria-label": index ? _("Second conversation") : _("Conversation"),
  });
  const element = h(
    "section.card.side",
    { "aria-label": index ? _("Second model") : _("Model") },
    h("label.row", { for: `chat-model-${index}` }, h("span.dim.small", {}, _("Model")), field),
    log,
  );
  const hint = h(
    "p.empty",
    {},
    _(
      "A model that does not serve yet is loaded first; under its answer is how long that took. Nothing is kept when you leave.",
    ),
  );
  log.append(hint);
  let isChosen = false;
  let messages = [];
  let stopping = null;
  const self = {
    element,
    isBusy: false,
    name: () => field.value.trim(),
    suggest,
    say,
    stop: () => stopping?.abort(),
    clear,
  };

  function suggest(name) {
    if (!isChosen && !messages.length && document.activeElement !== field) field.value = name;
  }

  function clear() {
    self.stop();
    messages = [];
    log.replaceChildren(hint);
  }

  /** Asks, and shows the answer as it comes, with where the time went. */
  async function say(text, system, parameters, picture) {
    const model = self.name();
    const content = picture
      ? [
          { type: "text", text },
          { type: "image_url", image_url: { url: picture } },
        ]
      : text;
    const said = h("div.text");
    const thoughts = h("details.small", { hidden: true }, h("summary.dim", {}, _("Reasoning")), h("div.text.dim"));
    const facts = h("p.facts.dim.small", {}, _("waits for {model} …", { model }));
    hint.remove();
    log.append(
      h("div.asked", {}, picture && h("img", { src: picture, alt: _("Picture") }), h("div.text", {}, text)),
      h("div.answer", {}, thoughts, said, facts),
    );
    log.scrollTop = log.scrollHeight;
    log.setAttribute("aria-busy", "true");
    self.isBusy = true;
    stopping = new AbortController();
    const known = new Set(Object.keys(now.state?.jobs ?? {}));
    const began = performance.now();
    let first = 0;
    let usage = null;
    let answer = "";
    let thought = "";
    try {
      const asked = [...(system ? [{ role: "system", content: system }] : []), ...messages, { role: "user", content }];
      const body = JSON.stringify({
        model,
        messages: asked,
        stream: true,
        stream_options: { include_usage: true },
        ...parameters,
      });
      const stream = await ask("/v1/chat/completions", {
        method: "POST",
        body,
        headers: { "content-type": "application/json" },
        signal: stopping.signal,
      });
      for await (const [kind, data] of events(stream)) {
        if (kind === "comment") {
          if (!first) facts.textContent = data; // what the gateway waits for
          continue;
        }
        if (data === "[DONE]") break;
        const piece = JSON.parse(data);
        if (piece.error) throw Object.assign(new Error(piece.error.message), { hint: "" });
        usage = piece.usage ?? usage;
        const delta = piece.choices?.[0]?.delta;
        thought += delta?.reasoning_content ?? delta?.reasoning ?? "";
        if (thought) {
          thoughts.hidden = false;
          thoughts.lastChild.textContent = thought;
        }
        const more = delta?.content ?? "";
        if (!more) continue;
        first ||= performance.now();
        answer += more;
        const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        write(said, answer);
        if (isAtEnd) log.scrollTop = log.scrollHeight;
      }
      messages.push({ role: "user", content }, { role: "assistant", content: answer });
    } catch (error) {
      if (error.name === "AbortError") messages.push({ role: "user", content }, { role: "assistant", content: answer });
      else
        said.parentNode.insertBefore(
          h("p.bad", { role: "alert" }, error.message, error.hint ? h("span.dim", {}, ` ${error.hint}`) : null),
          facts,
        );
    }
    const ended = performance.now();
    self.isBusy = false;
    stopping = null;
    log.setAttribute("aria-busy", "false");
    facts.textContent = [
      swapWords(model, known),
      first ? _("first token after {time}", { time: seconds((first - began) / 1000) }) : "",
      usage ? many("{count} token", "{count} tokens", usage.completion_tokens) : "",
      usage && first && usage.completion_tokens > 1
        ? _("{rate} tokens/s", {
            rate: number((usage.completion_tokens - 1) / Math.max(0.001, (ended - first) / 1000), 0),
          })
        : "",
    ]
      .filter(Boolean)
      .join(" · ");
    log.scrollTop = log.scrollHeight;
  }

  return self;
}

/** How long the swap took that the answer waited for. */
function swapWords(model, known) {
  const jobs = Object.entries(now.state?.jobs ?? {}).filter(
    ([number_, job]) => !known.has(number_) && SWAPS.has(job.kind) && job.subject === model && job.finished_at,
  );
  const job = jobs.at(-1)?.[1];
  if (!job) return _("no swap");
  const took = seconds(job.finished_at - job.created_at);
  return job.how ? _("swap {time} ({how})", { time: took, how: job.how }) : _("swap {time}", { time: took });
}

/** Shows a text; what stands between lines of ``` is code. All of it is set as text. */
function write(element, text) {
  const parts = text.split(/^```.*$/m);
  if (parts.length === 1) {
    if (element.childNodes.length === 1 && element.firstChild.nodeType === Node.TEXT_NODE)
      element.firstChild.data = text;
    else element.replaceChildren(text);
    return;
  }
  element.replaceChildren(
    ...parts.map((part, index) =>
      index % 2 ? h("pre", { tabIndex: 0 }, h("code", {}, part.replace(/^\n/, ""))) : part,
    ),
  );
}
