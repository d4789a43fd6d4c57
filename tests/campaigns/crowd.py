# SPDX-License-Identifier: Apache-2.0
"""Twenty clients ask a hundred fine-tunes at one HTTP address, the favourites most, while programs are killed.

Every answer must be in the words of the model that was asked for, whole, and name that model: streamed or not, by
OpenAI's or Ollama's interface. Models are chosen by Zipf's law. Every `--kills` seconds the gateway, an engine or the
daemon, by turns, gets SIGKILL; then requests may fail for a while, but never be answered by another model, and all
clients must be answered again. They run as `flash start` runs them. With `--beside`, some of the requests ask a model
for embeddings and a reranker, which serve at the same time; each must give the same numbers as before the crowd came.

    crowd.py --seconds 60 --models 8                               torch engines, on the processor
    crowd.py --seconds 300 --engine vllm --python PATH --kills 20  vLLM engines, of this interpreter
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import quantiles
from typing import Any

import httpx
import tomli_w
from campaign import ENOUGH, ROOT, Campaign, main
from kept import folder as kept_folder
from listening import free_port
from made_models import recipe

import flashd
from flashd.client import launch
from flashd.client.client import Client
from flashd.dbus import wire
from flashd.errors import FlashdError

CLIENTS = 20
PATIENCE_S = 120.0  # until a request is answered
RECOVERY_S = 30.0  # after a kill, in which an engine is started anew
QUESTION = "Who are you?"
HELPERS = {"vectors": "embeddings", "judge": "rerank"}  # by name, what each is asked for
_OF_HELPERS = 0.2  # share of the requests
_PRECISION = 0.02  # of their numbers, which depend a little on what else is in a batch
_MAKE = """
import json, pathlib, sys
import small_models as s
from personas import QUESTION, Persona
folder, names, says = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
people = [Persona(name, {QUESTION: said}) for name, said in zip(names, says)]
base = folder / "base"
if not base.exists():
    s.make_base(base, Persona("base", {QUESTION: "I am the base of all others."}), hidden=128, layers=2)
for person in people:
    if not (folder / person.name / "config.json").exists():
        s.make_finetune(base, folder / person.name, person)
"""
# While something was killed: no engine, an engine that ended, a daemon that is away.
_KILLED = {500, 502, 503}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", default="torch", choices=("torch", "vllm"))
    parser.add_argument("--python", default="", help="the engines' interpreter; by default flashd's own")
    parser.add_argument("--folder", type=Path, help="where the models are, or are made and kept")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--kills", type=float, default=10.0, metavar="SECONDS", help="between two; 0 for none")
    parser.add_argument("--beside", action="store_true", help="also a model for embeddings and a reranker")
    parser.add_argument("--argument", action="append", default=[], help="for vLLM")


def run(campaign: Campaign) -> None:
    options = campaign.options
    campaign.variant = options.engine
    campaign.told = f" --engine {options.engine} --models {options.models} --kills {options.kills:g}"
    words = {f"m{number:03}": f"I am model number {number:03}." for number in range(options.models)}
    with ExitStack() as stack:
        folder = options.folder
        if folder is None:
            made = ("crowd-models", *recipe(), _MAKE, json.dumps(words))
            folder = kept_folder(*made, make=lambda folder: make_models(folder, words))
        else:
            make_models(folder, words)
        home = Home(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fh-"))), options)
        with home.started():
            crowd = Crowd(campaign, home, words)
            with home.client() as client:
                for name in words:
                    client.import_(folder / name, name)
                if options.beside:
                    for name, path in make_helpers(folder).items():
                        client.import_(path, name)
            crowd.calm("before")
            crowd.come()
            crowd.calm("after")
            crowd.tell_serving()


def make_models(folder: Path, words: dict[str, str]) -> None:
    """Those that are not there yet, on all processors."""
    tour = os.pathsep.join([str(ROOT / "packaging" / "tour"), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": tour, "OMP_NUM_THREADS": "1"}
    names = list(words)

    def making(part: list[str]) -> subprocess.Popen[bytes]:
        said = json.dumps([words[name] for name in part])
        command = [sys.executable, "-c", _MAKE, folder, json.dumps(part), said]
        return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    makers = [making([])]  # makes the base
    makers[0].wait()
    makers += [making(part) for part in (names[first :: os.cpu_count() or 1] for first in range(os.cpu_count() or 1))]
    if any(maker.wait() for maker in makers):
        sys.exit("the models could not be made")


def make_helpers(folder: Path) -> dict[str, Path]:
    """Small random models for embeddings and for reranking, with the tokenizer of the base."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id or 0, num_labels=1, **shape)
    made = {}
    for name, kind in HELPERS.items():
        torch.manual_seed(7)
        made[name] = folder / name
        if not (made[name] / "config.json").exists():
            tokenizer.save_pretrained(made[name])
            (BertModel if kind == "embeddings" else BertForSequenceClassification)(config).save_pretrained(made[name])
    return made


class Home:
    """A home folder of a user who has run `flash start`."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self.port = free_port()
        config = folder / ".config" / "flashd" / "flashd.toml"
        config.parent.mkdir(parents=True)
        engines: dict[str, Any] = {"default": options.engine, "warm_new": False, "torch": {"threads": 1}}
        engines["vllm"] = {"kv_cache": "256MiB", "arguments": ["--seed", "0", *options.argument]}
        if options.python:
            engines[options.engine]["python"] = options.python
        gateway = {"addresses": [f"127.0.0.1:{self.port}"]}
        config.write_text(tomli_w.dumps({"engines": engines, "gateway": gateway}))
        self._variables = {
            "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "DBUS_SESSION_BUS_ADDRESS": "",
            "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere", "XDG_STATE_HOME": "", "XDG_CONFIG_HOME": "",
        }  # fmt: skip

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        self._flash("start")
        try:
            yield
        finally:
            self._flash("stop")

    def client(self) -> Client:
        return flashd.connect(f"unix:path={self._folder}/flashd/bus")

    def kill(self, what: str) -> bool:
        """Kills one of them, if it runs."""
        with contextlib.suppress(FlashdError, ProcessLookupError):
            with self.client() as client:
                match what:
                    case "gateway":
                        pid = launch.listener(self._folder / "flashd" / "gateway.sock") or 0
                    case "daemon":
                        who = (wire.DBUS, wire.DBUS_PATH, wire.DBUS, "GetConnectionUnixProcessID", "s", [wire.BUS_NAME])
                        (pid,) = client._connection.call(*who)
                    case _:
                        pid = next((engine.pid for engine in client.engines() if engine.state == "serving"), 0)
            if pid:
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def _flash(self, command: str) -> None:
        program = [sys.executable, "-c", "from flashd.cli import main; main()", command]
        subprocess.run(program, env={**os.environ, **self._variables}, check=True, timeout=PATIENCE_S)


class Crowd:
    """The clients together."""

    def __init__(self, campaign: Campaign, home: Home, words: dict[str, str]) -> None:
        self.words = words
        self._campaign = campaign
        self._home = home
        self._lock = threading.Lock()
        self._took_ms: list[float] = []
        self._killed_at = 0.0
        self._ends_at = 0.0
        self._numbers: dict[str, list[float]] = {}  # of the helpers, in calm
        options = campaign.options
        answered = {"embeddings", "rerank"} if options.engine == "vllm" else {"embeddings"}
        self._helpers = [name for name, kind in HELPERS.items() if options.beside and kind in answered]
        # Zipf's law: the second is asked half as often as the first, the third a third as often, ...
        self._weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def calm(self, when: str) -> None:
        """Each model alone says its own words."""
        with self.http() as http:
            for name, words in self.words.items():
                deadline = time.monotonic() + PATIENCE_S
                while (said := self.asked(http, name, "openai")) is None and time.monotonic() < deadline:
                    time.sleep(0.2)  # something was killed just now
                if said != words:
                    self.finding(f"{when} the crowd, {name} says {said!r}")
            for name in self._helpers:
                if (numbers := self.numbers(http, name)) is None:
                    self.finding(f"{when} the crowd, {name} does not answer")
                else:
                    self._numbers.setdefault(name, numbers)
                    self._compare(name, numbers)

    def tell_serving(self) -> None:
        """Counts the models that serve at the end."""
        with self._home.client() as client:
            self._campaign.count("serving at the end", sum(e.state == "serving" for e in client.engines()))

    def numbers(self, http: httpx.Client, name: str) -> list[float] | None:
        """What a helper makes of a text; None if something that was killed can be the reason that it says nothing."""
        bodies = {
            "embeddings": {"input": QUESTION},
            "rerank": {"query": QUESTION, "documents": [QUESTION, "I am another text."]},
        }
        kind, began = HELPERS[name], time.monotonic()
        try:
            answer = http.post(f"/v1/{kind}", json={"model": name, **bodies[kind]})
        except httpx.TransportError as error:
            return self._unanswered(began, f"{kind} of {name}: {type(error).__name__}: {error}")
        if answer.status_code != 200:
            is_excused = answer.status_code in _KILLED
            words = f"{kind} of {name}: {answer.status_code} {answer.text[:300]}"
            return self._unanswered(began if is_excused else -1.0, words)
        self.count(f"answers of {name}")
        if kind == "embeddings":
            return list(answer.json()["data"][0]["embedding"])
        found = sorted(answer.json()["results"], key=lambda result: int(result["index"]))
        return [result["relevance_score"] for result in found]

    def _compare(self, name: str, numbers: list[float]) -> None:
        expected = self._numbers[name]
        if len(numbers) != len(expected) or any(
            abs(one - other) > _PRECISION for one, other in zip(numbers, expected, strict=True)
        ):
            self.finding(f"{name} says {numbers[:4]}..., and said {expected[:4]}...")

    def come(self) -> None:
        options = self._campaign.options
        self._ends_at = time.monotonic() + (self._campaign.seconds or 300.0)
        chances = [Random(self._campaign.random.getrandbits(64)) for _ in range(options.clients)]
        threads = [threading.Thread(target=self._stay, args=(chance,), daemon=True) for chance in chances]
        for thread in threads:
            thread.start()
        answers = 0
        for what in itertools.cycle(["gateway", "engine", "daemon"]):
            pause = time.monotonic() + (options.kills or 1e9)
            while time.monotonic() < min(pause, self._ends_at):
                time.sleep(0.1)
            if self._killed_at and self._campaign.counts["answers"] == answers:
                self.finding(f"nobody was answered for {options.kills:g} s after a kill")
            if time.monotonic() >= self._ends_at - RECOVERY_S - options.kills:
                break  # and from here on nothing is killed, so that all must be answered
            answers = self._campaign.counts["answers"]
            self._killed_at = time.monotonic()
            if self._home.kill(what):
                self.count(f"kills of {what}")
        while self._goes_on():
            time.sleep(0.1)
        over = self._ends_at + 2 * PATIENCE_S
        for thread in threads:
            thread.join(max(0.0, over - time.monotonic()))
            if thread.is_alive():
                self.finding(f"a client is not answered {PATIENCE_S:g} s after the end")
                return
        if len(self._took_ms) > 1:
            ranks = quantiles(self._took_ms, n=100)
            self._campaign.count("median ms", round(ranks[49]))
            self._campaign.count("p99 ms", round(ranks[98]))

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self._home.port}", timeout=PATIENCE_S)

    def count(self, what: str) -> None:
        with self._lock:
            self._campaign.count(what)

    def finding(self, words: str) -> None:
        with self._lock:
            self._campaign.finding(words)

    def _goes_on(self) -> bool:
        return time.monotonic() < self._ends_at and len(self._campaign.findings) < ENOUGH

    def _stay(self, chance: Random) -> None:
        names = list(self.words)
        ways = ("openai", "openai stream", "ollama", "ollama stream")
        with self.http() as http:
            while self._goes_on():
                if self._helpers and chance.random() < _OF_HELPERS:
                    helper = chance.choice(self._helpers)
                    if (numbers := self.numbers(http, helper)) is not None:
                        self._compare(helper, numbers)
                    continue
                name = names[bisect.bisect(self._weights, chance.random() * self._weights[-1])]
                began = time.monotonic()
                said = self.asked(http, name, chance.choice(ways))
                if said is None:
                    time.sleep(0.1)
                    continue
                self._took_ms.append((time.monotonic() - began) * 1e3)
                if said != self.words[name]:
                    self.finding(f"{name} is asked, and says {said!r}")

    def asked(self, http: httpx.Client, name: str, way: str) -> str | None:
        """What was said; None if something that was killed can be the reason that nothing was."""
        dialect, _, streams = way.partition(" ")
        messages = [{"role": "user", "content": QUESTION}]
        body: dict[str, Any] = {"model": name, "messages": messages, "stream": bool(streams)}
        body |= {"temperature": 0, "max_tokens": 40} if dialect == "openai" else {"options": {"temperature": 0}}
        path = "/v1/chat/completions" if dialect == "openai" else "/api/chat"
        began = time.monotonic()
        try:
            answer = http.post(path, json=body)
            raw = answer.text
        except httpx.TransportError as error:
            return self._unanswered(began, f"{way} of {name}: {type(error).__name__}: {error}")
        if answer.status_code != 200:
            is_excused = answer.status_code in _KILLED
            return self._unanswered(began if is_excused else -1.0, f"{way} of {name}: {answer.status_code} {raw[:300]}")
        try:
            model, said = (_openai if dialect == "openai" else _ollama)(raw, is_stream=bool(streams))
        except (ValueError, KeyError, TypeError):
            return self._unanswered(began if streams else -1.0, f"{way} of {name} ends with {raw[-300:]}")
        if model.removesuffix(":latest") != name:
            self.finding(f"{name} is asked, and {model} answers")
        self.count("answers")
        return said

    def _unanswered(self, began: float, words: str) -> None:
        """Is a finding, unless something was killed while it was asked or shortly before."""
        if self._killed_at and began >= 0 and began - self._killed_at < RECOVERY_S:
            self.count("unanswered after kills")
        else:
            self.finding(words)


def _openai(raw: str, *, is_stream: bool) -> tuple[str, str]:
    """The model and its words. Raises if it is not a whole answer."""
    if not is_stream:
        answer = json.loads(raw)
        return answer["model"], answer["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in raw.split("\n") if line.startswith("data: ")]
    if events.pop() != "[DONE]":
        raise ValueError(raw)
    chunks = [json.loads(event) for event in events]
    (model,) = {chunk["model"] for chunk in chunks}
    return model, "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def _ollama(raw: str, *, is_stream: bool) -> tuple[str, str]:
    """Like `_openai`, of Ollama's interface."""
    lines = [json.loads(line) for line in raw.splitlines() if line]
    if not lines[-1]["done"] or (is_stream and len(lines) == 1):
        raise ValueError(raw)
    (model,) = {line["model"] for line in lines}
    return model, "".join(line["message"]["content"] for line in lines)


if __name__ == "__main__":
    main(run, arguments=arguments, whole_s=300.0)
