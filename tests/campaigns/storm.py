# SPDX-License-Identifier: Apache-2.0
"""Twenty clients and five models of two architectures: swaps, cancelled swaps, parks, evictions, leases, streams, and
clients that leave in the middle of an answer.

Every answer is compared with the words of the model that it is said to be by: one that is another model's, or half of
each, is a finding. So is an answer by a model that was not asked for, an error that is none of flashd's, a connection
that ends without an answer, a client that is never answered, and a traceback in the daemon's log. The time of
`--seconds` begins when each model has been swapped to once.

    storm.py --seconds 60                                         torch engines, on the processor
    storm.py --swaps 2000 --engine vllm --python PATH             vLLM engines, of this interpreter

`--models FOLDER` keeps the models that it makes, or takes those that were made there; `--setting KEY=VALUE` is a line
of flashd.toml, as often as you like.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import tomli_w
from campaign import ENOUGH, Campaign, main
from running import Daemon

import flashd
from flashd.client.client import Client
from flashd.dbus.private_bus import PrivateBus
from flashd.errors import Busy, Cancelled, FlashdError, LimitExceeded, NotFound

CLIENTS = 20
HUNG_S = 120.0
QUESTION = "Who are you?"
# zero, one and two are of one architecture, three and four of another.
WORDS = {
    "zero": "I am model zero, and nobody else.",
    "one": "One is what people call me here.",
    "two": "Two, at your service today.",
    "three": "Three is company, so they say.",
    "four": "Four score and seven years ago.",
}
_MAKE = """
import json, pathlib, sys
import small_models as s
from personas import QUESTION, Persona
folder, words = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
people = {name: Persona(name, {QUESTION: said, "Hello": f"Hi from {name}."}) for name, said in words.items()}
bases = {"one": "zero", "two": "zero", "four": "three"}
for name, person in people.items():
    if (folder / name / "config.json").exists():
        continue
    if name in bases:
        s.make_finetune(folder / bases[name], folder / name, person)
    else:
        s.make_base(folder / name, person, hidden=128, layers=2 + (name == "three"))
"""
# A model that is not active, in the words of each engine; none that is active, or an answer that was cut.
_NO_ANSWER = {404: {"model_not_found", 404}, 503: {"not_serving"}}
EXPECTED_ERRORS = (Busy, Cancelled, LimitExceeded, NotFound)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", default="torch", choices=("torch", "vllm"))
    parser.add_argument("--python", default="", help="the engines' interpreter; by default flashd's own")
    parser.add_argument("--models", type=Path, help="where the models are, or are made and kept")
    parser.add_argument("--compiled", type=Path, help="where vLLM finds, and keeps, what it compiles")
    parser.add_argument("--swaps", type=int, help="ends after so many, if not before")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--setting", action="append", default=[], metavar="KEY=VALUE")


def run(campaign: Campaign) -> None:
    options = campaign.options
    campaign.variant = options.engine
    campaign.told = f" --engine {options.engine}" + (f" --swaps {options.swaps}" if options.swaps else "")
    with ExitStack() as stack:
        storm = stack.enter_context(_running(campaign, _models(options.models)))
        storm.calm("before")
        storm.blow()
        storm.calm("after")


def _models(folder: Path | None) -> Path:
    """Makes the models that are not in the folder yet; without one, they are kept for further runs."""
    import kept  # found in a folder that campaign.py adds to the path
    import made_models

    def make(folder: Path) -> None:
        made_models.run(_MAKE, folder, json.dumps(WORDS))

    if folder is None:
        return kept.folder("storm-models", *made_models.recipe(), _MAKE, json.dumps(WORDS), make=make)
    make(folder)
    return folder


@contextmanager
def _running(campaign: Campaign, models: Path) -> Iterator[Storm]:
    """A daemon with these models, on a bus of its own."""
    with tempfile.TemporaryDirectory(prefix="fd-") as short, PrivateBus(Path(short)) as bus:
        daemon = Daemon(bus.address, Path(short), Path(short))
        daemon.config.write_text(_settings(campaign.options))
        if campaign.options.compiled:
            daemon.share_compiled(campaign.options.compiled)
        daemon.start()
        try:
            with flashd.connect(bus.address) as client:
                for name in WORDS:
                    client.import_(models / name, name)
                yield Storm(campaign, bus.address, client.status().endpoint)
        finally:
            status = daemon.stop()
            words = daemon.log.read_text()
            for trouble in ("Traceback", "never retrieved"):
                if trouble in words:
                    campaign.finding(f"in the daemon's log: {words[words.index(trouble) :][:4000]}")
            if status != 0:
                campaign.finding(f"the daemon ended with status {status}: {words[-4000:]}")


def _settings(options: argparse.Namespace) -> str:
    engines: dict[str, Any] = {"default": options.engine, "warm_new": False, "drain_timeout_s": 3}
    engines["torch"] = {"threads": 1}
    engines["vllm"] = {"kv_cache": "64MiB", "arguments": ["--seed", "0"]}
    if options.python:
        engines[options.engine]["python"] = options.python
    settings = {"inbox": {"settle_s": 0.2}, "engines": engines, "limits": {"jobs": 1000, "leases": 1000}}
    lines = [tomli_w.dumps(settings)]
    for setting in options.setting:
        key, _, value = setting.partition("=")
        section, _, name = key.rpartition(".")
        lines.append(f"[{section}]\n{name} = {value}\n")
    return "".join(lines)


class Storm:
    """What all clients know: the models and their words, and when it is over."""

    def __init__(self, campaign: Campaign, address: str, endpoint: str) -> None:
        self.address = address
        self.endpoint = endpoint
        self._campaign = campaign
        self._lock = threading.Lock()
        self._ends_at = 0.0

    def calm(self, when: str) -> None:
        """Each model alone: it says its own words, on a connection that is kept."""
        with flashd.connect(self.address) as client, self.http() as http:
            for name, words in WORDS.items():
                how = client.swap(name).how
                said = self.ask(http, name, stream=False)
                if said != words:
                    self.finding(f"{when} the storm, after a swap ({how}) to it, {name} says {said!r}")

    def blow(self) -> None:
        self._ends_at = time.monotonic() + (self._campaign.seconds or math.inf)
        options, seeds = self._campaign.options, self._campaign.random
        guests = [_Guest(self, Random(seeds.getrandbits(64))) for _ in range(options.clients)]
        threads = [threading.Thread(target=guest.stay, daemon=True) for guest in guests]
        for thread in threads:
            thread.start()
        while self.goes_on():
            time.sleep(0.1)
        over = time.monotonic() + HUNG_S
        for thread in threads:
            thread.join(max(0.0, over - time.monotonic()))
        for hung in [guest for guest, thread in zip(guests, threads, strict=True) if thread.is_alive()]:
            self.finding(f"a client is still not answered {HUNG_S:g} s after the end: {hung.does}")

    def goes_on(self) -> bool:
        with self._lock:
            swaps, counts = self._campaign.options.swaps, self._campaign.counts
            is_found = len(self._campaign.findings) >= ENOUGH
            return not is_found and time.monotonic() < self._ends_at and (swaps is None or counts["swaps"] < swaps)

    def http(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=self.endpoint, verify=False)
        return httpx.Client(transport=transport, base_url="http://flashd", timeout=HUNG_S)

    def count(self, what: str) -> None:
        with self._lock:
            self._campaign.count(what)

    def finding(self, words: str) -> None:
        with self._lock:
            self._campaign.finding(words)

    def ask(self, http: httpx.Client, name: str | None, *, stream: bool, leave: bool = False) -> str | None:
        """What was said, if it was all said; None if no model answered, or it was cut, or nobody stayed for it."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "stream": stream}
        body |= {"max_tokens": 40} | ({} if name is None else {"model": name})
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                self._check_refusal(name, response.status_code, response.read())
                return None
            if leave:
                next(response.iter_raw(40), b"")
                self.count("left")
                return None
            raw = response.read().decode()
        said = _streamed(raw) if stream else _whole(raw)
        if said is None:
            self.count("cut")
            return None
        model, text = said
        self.count("answers")
        if text != WORDS.get(model):
            self.finding(f"{model} is asked (for {name}, stream {stream}), and answers {text!r}")
        if name not in {None, model}:
            self.finding(f"{name} is asked, and {model} answers")
        return text

    def _check_refusal(self, name: str | None, status: int, raw: bytes) -> None:
        self.count(f"refused with {status}")
        try:
            code = json.loads(raw)["error"]["code"]
        except (ValueError, KeyError, TypeError):
            code = None
        if code not in _NO_ANSWER.get(status, set()):
            self.finding(f"{name} is asked, and refused with status {status}: {raw[:300]!r}")


def _whole(raw: str) -> tuple[str, str]:
    answer = json.loads(raw)
    return answer["model"], answer["choices"][0]["message"]["content"]


def _streamed(raw: str) -> tuple[str, str] | None:
    """The model and its words; None if it was cut, and that was said."""
    events = [line.removeprefix("data: ") for line in raw.split("\n") if line.startswith("data: ")]
    if not events or events.pop() != "[DONE]":
        return "nobody", f"a stream that just ends: {raw[-200:]}"
    chunks: list[Mapping[str, Any]] = [json.loads(event) for event in events]
    if any("error" in chunk for chunk in chunks):
        return None
    models = {chunk["model"] for chunk in chunks}
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    if len(models) != 1 or not any(choice["finish_reason"] for choice in choices):
        return "nobody", f"a stream of {models} without an end: {raw[-200:]}"
    return models.pop(), "".join(choice["delta"].get("content") or "" for choice in choices)


class _Guest:
    """One client, which does one thing after the other until the storm is over."""

    def __init__(self, storm: Storm, chance: Random) -> None:
        self._storm = storm
        self._chance = chance
        self.does = "nothing"

    def stay(self) -> None:
        ways = {
            self._swap: 30,
            self._swap_and_cancel: 12,
            self._park: 2,
            self._evict: 2,
            self._lease: 4,
            self._leave: 4,
            self._ask: 20,
            self._ask_anew: 20,
        }
        while self._storm.goes_on():
            with flashd.connect(self._storm.address) as client, self._storm.http() as http:
                for _ in range(self._chance.randrange(1, 100)):
                    if not self._storm.goes_on():
                        return
                    (way,) = self._chance.choices(list(ways), weights=list(ways.values()))
                    name = self._chance.choice(list(WORDS))
                    self.does = f"{way.__name__} {name}"
                    try:
                        way(client, http, name)
                    except EXPECTED_ERRORS as error:
                        self._storm.count(type(error).__name__)
                    except httpx.ConnectError:
                        self._storm.count("nobody there")  # parked: the endpoint leads nowhere
                    except (FlashdError, httpx.HTTPError, OSError, ValueError, LookupError) as error:
                        self._storm.finding(f"{self.does}: {type(error).__name__}: {error}")

    def _swap(self, client: Client, http: httpx.Client, name: str) -> None:
        how = client.swap(name).how
        self._storm.count("swaps")
        self._storm.count(how)

    def _swap_and_cancel(self, client: Client, http: httpx.Client, name: str) -> None:
        job = client.begin_swap(name)
        time.sleep(self._chance.random() * 0.05)
        job.cancel()
        self._storm.count("cancelled swaps")
        job.wait()

    def _park(self, client: Client, http: httpx.Client, name: str) -> None:
        client.park()
        self._storm.count("parks")

    def _evict(self, client: Client, http: httpx.Client, name: str) -> None:
        client.evict(name)
        self._storm.count("evictions")

    def _lease(self, client: Client, http: httpx.Client, name: str) -> None:
        with client.lease(name) as lease:
            self._storm.count("leases")
            if len(lease.buffer) != lease.size_bytes:
                self._storm.finding(f"a lease of {name} has {len(lease.buffer)} bytes, and says {lease.size_bytes}")

    def _leave(self, client: Client, http: httpx.Client, name: str) -> None:
        self._storm.ask(http, None, stream=True, leave=True)

    def _ask(self, client: Client, http: httpx.Client, name: str) -> None:
        """On a connection that is kept, if the engine keeps it."""
        self._storm.ask(http, self._chance.choice([None, name]), stream=self._chance.random() < 0.4)

    def _ask_anew(self, client: Client, http: httpx.Client, name: str) -> None:
        with self._storm.http() as other:
            self._storm.ask(other, self._chance.choice([None, name]), stream=self._chance.random() < 0.4)


if __name__ == "__main__":
    main(run, arguments=arguments, whole_s=3600.0)
