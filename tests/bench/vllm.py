#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The time from asking for a model to its first token with vLLM, by flashd and by vLLM's own means.

    tests/bench/vllm.py MODEL MODEL... [--runs 30] [--rounds 0] [--python PYTHON] [--argument=...]... [--json FILE]

Each MODEL is the folder of a fine-tune; all have one architecture (tests/bench/random_models.py makes some). PYTHON has
vLLM and flashd. What vLLM does by itself (a start from nothing, its sleep levels and wake, its reload) is measured in
the same run.

Every answer of flashd's engines is compared, token for token: with what the same engine answered to the same model
before, which it must equal; and with that of other engines, and of a fresh vLLM that loads the model itself, from which
it may part only where two tokens are as likely as each other. Kernels are chosen anew when an engine is compiled or
loads what was, and round otherwise; of random weights nearly all tokens are alike, so that this shows soon. How many
answers did is the row `answers_parted`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from own_daemon import own_daemon

import flashd
from flashd.bench.copying import Link, device_of
from flashd.bench.report import Report, Row, cost_row, report
from flashd.bench.stream import Ready
from flashd.checkpoint import header
from flashd.config.environment import child_environment
from flashd.engines.vllm_factory import environment
from flashd.io.streamer import ALIGNMENT, raw_read
from flashd.memory.device import Device
from flashd.units import MiB

# 11-25 23:10:02 [gpu_model_runner.py:5120] Graph capturing finished in 3 secs
_SPENT = re.compile(r"(\d\d:\d\d:\d\d) \[[\w.:/]+\] (.*\d\.?\d* ?(?:s|secs|seconds)\b.*)")
PROMPT = "Hello, who are you?"
TOKENS = 16
KV_CACHE = 2 << 30
_SMALL_BYTES = 2 << 30  # five such models fit on any card, with what their engines need besides

# vLLM alone, in a process of its own; prints one JSON object.
PLAIN = """
import json, sys, time
started = time.perf_counter()
runs, kv_cache, prompt, tokens = json.loads(sys.argv[1])
arguments = json.loads(sys.argv[2])
from vllm import LLM, SamplingParams

def main():
    greedy = SamplingParams(temperature=0, max_tokens=tokens, seed=0, logprobs=2)
    one = SamplingParams(temperature=0, max_tokens=1)
    sleeps = "enforce_cpu" not in arguments
    options = {k: v for k, v in arguments.items() if k != "enforce_cpu"}
    llm = LLM("./model", enable_sleep_mode=sleeps, kv_cache_memory_bytes=kv_cache, **options)
    ask = lambda how: llm.generate([prompt], how, use_tqdm=False)[0].outputs[0]
    def answer():
        found = ask(greedy)
        likeliest = [{token: entry.logprob for token, entry in place.items()} for place in found.logprobs]
        return {"tokens": list(found.token_ids), "likeliest": likeliest}
    ask(one)
    found = {"cold": time.perf_counter() - started, "first_token": [], "sleep1": [], "sleep2": []}
    found["answer"] = answer()
    for _ in range(runs):
        t = time.perf_counter(); ask(one); found["first_token"].append(time.perf_counter() - t)
    for level, name in ((1, "sleep1"), (2, "sleep2")) if sleeps and runs else ():
        for _ in range(4):
            llm.sleep(level=level)
            t = time.perf_counter()
            llm.wake_up()
            if level == 2:
                llm.collective_rpc("reload_weights")
                llm.reset_prefix_cache()
            ask(one)
            found[name].append(time.perf_counter() - t)
            assert answer()["tokens"] == found["answer"]["tokens"]
        found[name] = found[name][1:]  # the first fills the caches of the others
    print("FOUND " + json.dumps(found), flush=True)

if __name__ == "__main__":
    main()
"""


# Logits are of this size where the likeliest tokens are: two steps of bfloat16 there, of logarithms of probabilities.
_AS_LIKELY_LOGPROB = 2 * 2**-5
partings: list[str] = []  # differences of answers, with the tokens' likelihoods


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids, and for each place the likeliest two with their logarithms."""

    tokens: list[int]
    likeliest: list[dict[int, float]]

    @classmethod
    def parse(cls, tokens: list[int], likeliest: Sequence[Mapping[str, float]]) -> Answer:
        return cls(tokens, [{int(name.removeprefix("token_id:")): value for name, value in place.items()}
                            for place in likeliest])  # fmt: skip

    def parted_from(self, other: Answer) -> str:
        """Why this is another answer; empty if it is none: the same, until two tokens come that are as likely as each
        other to both."""
        for place, (ours, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if ours != theirs:
                gaps = [abs(seen.get(ours, -math.inf) - seen.get(theirs, -math.inf))
                        for seen in (self.likeliest[place], other.likeliest[place])]  # fmt: skip
                partings.append(f"at token {place}, between two that are {gaps[0]:.4f} and {gaps[1]:.4f} apart")
                print(f"parted {partings[-1]}", flush=True)
                return "" if all(gap <= _AS_LIKELY_LOGPROB for gap in gaps) else f"{self.tokens} is not {other.tokens}"
        return "" if len(self.tokens) == len(other.tokens) else f"{self.tokens} is not {other.tokens}"


@dataclass(slots=True)
class Figures:
    """Milliseconds by row, what each model answered first, and what each engine (its process) answered to it."""

    answers: dict[str, Answer] = field(default_factory=dict)
    by_engine: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def plain(python: str, model: Path, runs: int, options: dict[str, Any], folder: Path, caches: Path) -> dict[str, Any]:
    """Where the model is called as flashd's engines call it: the path is part of the key of what is compiled."""
    job = json.dumps([runs, KV_CACHE, PROMPT, TOKENS])
    with tempfile.TemporaryDirectory(dir=folder) as made:
        script, link = Path(made, "plain.py"), Path(made, "model")
        script.write_text(PLAIN)
        link.symlink_to(model)
        done = subprocess.run(
            [python, script.name, job, json.dumps(options)], cwd=made,
            capture_output=True, text=True, check=False, env=child_environment(environment(caches)), timeout=500,
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        sys.exit(f"plain vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
    return found


def served_alone(
    python: str, model: Path, runs: int, options: dict[str, Any], folder: Path, caches: Path
) -> list[float]:
    """Seconds to a first token from vLLM's own server, asked as flashd's engine is: over a Unix socket, by the same
    client, with the same limits. The script of `plain` has neither a server nor HTTP."""
    arguments = ["--kv-cache-memory-bytes", str(KV_CACHE), "--disable-log-stats"]
    for name, value in options.items():
        if name != "enforce_cpu":
            arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    if "enforce_cpu" not in options:
        arguments.append("--enable-sleep-mode")
    with tempfile.TemporaryDirectory(dir=folder) as made, (folder / "served-alone.log").open("wb") as log:
        Path(made, "model").symlink_to(model)
        server = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.cli.main", "serve", "./model", "--uds", "socket", *arguments], cwd=made,
            stdout=log, stderr=log, env=child_environment(environment(caches)), start_new_session=True,
        )  # fmt: skip
        try:
            asking = Asking(str(Path(made, "socket")), model="./model")
            while not asking.is_ready():
                if server.poll() is not None:
                    sys.exit(f"vllm serve failed:\n{Path(log.name).read_text()[-4000:]}")
                time.sleep(0.5)
            took = []
            for _ in range(3 + runs):
                started = time.perf_counter()
                asking.first_token()
                took.append(time.perf_counter() - started)
            return took[3:]
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def differing(
    python: str, answers: dict[str, Answer], models: Sequence[Path], options: dict[str, Any], folder: Path
) -> list[str]:
    """The models to which a fresh vLLM answers otherwise. It is told the same limits as flashd's engines, and has what
    they compiled."""
    alike = {**options, "max_num_seqs": 32, "max_num_batched_tokens": 8192}
    if "enforce_cpu" not in options:
        alike["gpu_memory_utilization"] = 0.01  # decides nothing beside a KV cache of a given size
    caches = folder / "state/compiled"
    compiled_before = compiled(caches)
    with ThreadPoolExecutor(2 if weights_bytes(models[0]) > _SMALL_BYTES else 5) as pool:
        found = list(pool.map(lambda model: plain(python, model, 0, alike, folder, caches)["answer"], models))
    if anew := compiled(caches) - compiled_before:
        print(f"fresh engines have {len(anew)} other keys of what is compiled, so their rounding may differ")
    different = []
    for model, answer in zip(models, found, strict=True):
        if why := answers[model.name].parted_from(Answer.parse(**answer)):
            different.append(model.name)
            print(f"{model.name}: {why}, a fresh vLLM's")
    return different


def weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def compiled(caches: Path) -> set[Path]:
    """A folder for each key under which something was compiled."""
    return {path for path in (caches / "vllm/torch_compile_cache").glob("*/*") if path.is_dir()}


def settings(python: str, arguments: Sequence[str]) -> str:
    return (
        "[engines]\ndefault = 'vllm'\nwarm_new = false\n"
        f"[engines.vllm]\npython = '{python}'\nkv_cache = '2GiB'\narguments = {json.dumps(list(arguments))}\n"
    )


class Asking:
    """Requests to the endpoint, over one connection as long as its engine lives, as a program would keep it."""

    def __init__(self, socket: str, model: str | None = None) -> None:
        """`model` is the name to ask for, where a server insists on one."""
        transport = httpx.HTTPTransport(uds=socket, verify=False)
        self._http = httpx.Client(transport=transport, base_url="http://localhost", timeout=500)
        self._named = {} if model is None else {"model": model}

    def is_ready(self) -> bool:
        try:
            return self._http.get("/health").is_success
        except httpx.TransportError:
            return False

    def first_token(self) -> None:
        self._ask({"max_tokens": 1})

    def answer(self) -> Answer:
        more = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 2}
        found = self._ask({"max_tokens": TOKENS, "seed": 0, **more})
        return Answer.parse(found["token_ids"], found["logprobs"]["top_logprobs"])

    def _ask(self, how: dict[str, Any]) -> dict[str, Any]:
        answer = self._http.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, **self._named, **how})
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["choices"][0]
        return found


def measured(client: flashd.Client, models: Sequence[Path], runs: int, rounds: int, caches: Path) -> Figures:
    """The first model's image gets to the disk before there are others: they may leave no room for theirs."""
    figures = Figures()
    names = [model.name for model in models]
    client.import_(models[0], names[0])
    asking = Asking(client.status().endpoint)

    def first_token(name: str, row: str, how: str) -> None:
        started = time.perf_counter()
        outcome = client.swap(name)
        asking.first_token()
        took_ms = (time.perf_counter() - started) * 1e3
        if outcome.how != how:
            sys.exit(f"{row}: {name} came by {outcome.how}")
        figures.ms[row].append(took_ms)
        print(f"{row:32s} {took_ms:9.1f} ms  ({outcome.how} from {outcome.from_tier})", flush=True)
        check(name)

    def check(name: str) -> None:
        found, engine = asking.answer(), max(client.engines(), key=lambda engine: engine.started_at).pid
        before = figures.by_engine.setdefault((engine, name), found.tokens)
        if found.tokens != before:
            sys.exit(f"{name} answers {found}, and the same engine answered {before} before")
        if why := found.parted_from(figures.answers.setdefault(name, found)):
            sys.exit(f"{name}: {why}, another engine's")

    def stop_engines() -> None:
        for engine in client.engines():
            client.stop_engine(engine)

    first_token(names[0], "first_swap_first_token", "start")
    settle(client)
    if "is not stored" in (caches.parents[1] / "log").read_text():
        sys.exit("the disk has no room for an image, without which swaps from there, or from the host, take a reload")
    for model in models[1:]:
        client.import_(model, model.name)
        first_token(model.name, "first_rebind_first_token", "rebind")
    for turn in range(runs):
        first_token(names[turn % len(names)], "resident_rebind_first_token", "rebind")
        started = time.perf_counter()
        asking.first_token()
        figures.ms["first_token"].append((time.perf_counter() - started) * 1e3)
    for turn in range(max(4, runs // 4)):
        client.park()
        first_token(names[turn % len(names)], "resident_wake_first_token", "wake")
    for turn in range(rounds * len(names)):
        first_token(names[turn % len(names)], "round_robin_first_token", "rebind")
    client.park()
    for _ in range(3):
        client.evict(names[0])
        client.load(names[0], "host")
        time.sleep(3)  # until the driver's figures follow
        first_token(names[0], "host_wake_first_token", "wake")
        client.park()
    for _ in range(3):
        client.evict(names[0])
        first_token(names[0], "stored_swap_first_token", "wake")
        client.park()
    before = driver_used_bytes(client)  # after the park
    counted = sum(engine.device_bytes for engine in client.engines())
    stop_engines()
    figures.ms["parked_device_bytes"].append(max(0, before - driver_used_bytes(client)))
    print(f"the driver counts {counted} bytes as the parked engine's, and has as many fewer in use without it: "
          f"{figures.ms['parked_device_bytes'][0]}")  # fmt: skip
    before_keys = compiled(caches)
    for _ in range(3):
        stop_engines()
        first_token(names[0], "new_architecture_first_token", "start")
    print(f"new engines have {len(compiled(caches) - before_keys)} new keys of what is compiled")
    return figures


def settle(client: flashd.Client) -> None:
    """Images are written behind our back; wait until the store does not grow any more."""
    before = -1
    while before != client.status().store_bytes:
        before = client.status().store_bytes
        time.sleep(3)


def driver_used_bytes(client: flashd.Client) -> int:
    """What everybody uses of the cards, when two answers in a row are the same: a driver takes a moment to clear up."""
    before, found = -1, 0
    for _ in range(10):  # unless others use them
        if before == found:
            break
        before = found
        time.sleep(2)  # older answers are not given again by then
        client.devices()
        time.sleep(0.5)
        found = sum(device.driver_used_bytes for device in client.devices() if device.name != "host")
    return found


def spent(folder: Path) -> None:
    """Prints where the time of each start went, by what vLLM itself says in the engines' logs."""
    for log in sorted(folder.glob("state/logs/engine-*.log"), key=lambda path: path.stat().st_mtime):
        print(f"{log.stem}:")
        for line in log.read_text(errors="replace").splitlines():
            if found := _SPENT.search(line):
                print(f"  {found[1]}  {found[2]}")


def limits(folder: Path) -> tuple[float | None, float]:
    """Milliseconds that one copy of pinned memory and one raw read take for one of the checkpoints."""
    path = next((folder / "state/store/checkpoints").rglob("model.safetensors"))
    with path.open("rb") as file:
        found = header.read(file.fileno(), str(path))
    size_bytes = found.data_bytes // ALIGNMENT * ALIGNMENT
    device = device_of("auto")
    with Ready(found.data_bytes, device) as ready:
        read_s = raw_read(
            str(path), offset=found.data_offset, address=ready.address, size_bytes=size_bytes,
            block_bytes=8 * MiB, depth=24,
        )  # fmt: skip
        if device is None:
            return None, read_s * 1e3
        with Link(device, found.data_bytes) as link:
            link.copy(ready.address, found.data_bytes)
            return link.copy(ready.address, found.data_bytes) * 1e3, read_s * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=0, help="through all models, besides, with every answer compared")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--argument", action="append", default=[], help="for vLLM, of flashd's engines")
    parser.add_argument("--length", type=int, default=4096, help="most tokens of a request")
    parser.add_argument(
        "--folder", type=Path, help="on whose disk the store is to be; beside the first model unless given"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.python = str(Path.cwd() / options.python)  # the links of an environment stay as they are
    models = [model.resolve() for model in options.models]
    device = device_of("auto")
    alone: dict[str, Any] = {"seed": 0, "max_model_len": options.length}
    if device is None:
        alone |= {"enforce_cpu": True, "enforce_eager": True}
    arguments = ["--seed", "0", "--max-model-len", str(options.length), *options.argument]
    with tempfile.TemporaryDirectory(dir=options.folder or models[0].parent, prefix=".vllm-") as made:
        folder = Path(made).resolve()
        found = plain(options.python, models[0], options.runs, alone, folder, folder / "caches")
        found["serve"] = served_alone(options.python, models[0], options.runs, alone, folder, folder / "caches")
        print(f"vLLM by itself, in seconds: {json.dumps(found)}", flush=True)
        with own_daemon(folder, settings(options.python, arguments)) as client:
            figures = measured(client, models, options.runs, options.rounds, folder / "state/compiled")
            spent(folder)
        copy_ms, read_ms = limits(folder)
        made_report = reported(options, figures, found, copy_ms, read_ms, device)
        different = differing(options.python, figures.answers, models, alone, folder)
    if different:
        sys.exit(
            f"the answers of {', '.join(different)} are not those of a fresh vLLM, so these figures are worth nothing"
        )
    print(
        f"every answer was that of a fresh vLLM, but for {len(partings)} with tokens that are as likely as each other"
    )
    if options.json:
        count = Row("answers_parted", len(partings), "", None, None, (len(partings),))
        options.json.write_text(replace(made_report, rows=(*made_report.rows, count)).to_json() + "\n")


def reported(
    options: argparse.Namespace,
    figures: Figures,
    found: dict[str, Any],
    copy_ms: float | None,
    read_ms: float,
    device: Device | None,
) -> Report:
    """Also printed: what comes later may fail."""
    rows = rows_of(figures, found, copy_ms, read_ms)
    names = " ".join(model.name for model in options.models)
    rounds = f" --rounds {options.rounds}" if options.rounds else ""
    size_gb = weights_bytes(options.models[0]) / 1e9
    made = report(
        "robin" if rounds else "vllm",
        f"tests/bench/vllm.py {names} --runs {options.runs}{rounds} ({size_gb:.1f} GB each)",
        rows,
        driver=device.kind.value if device else "host",
        gpu=device.gpu if device else None,
    )
    for row in made.rows:
        beside = f"limit {row.limit:10.1f}" if row.limit else ""
        print(f"{row.name:32s} {row.value:12.1f} {row.unit:3s} {beside}", flush=True)
    return made


def rows_of(figures: Figures, found: dict[str, Any], copy_ms: float | None, read_ms: float) -> list[Row]:
    """flashd's rows stand beside what the issue allows them, vLLM's own beside nothing."""
    allowed = {
        "resident_rebind_first_token": 45.0,
        "resident_wake_first_token": 85.0,
        "host_wake_first_token": copy_ms and 1.15 * copy_ms + 100,
        "stored_swap_first_token": 1.1 * read_ms + 500,
        "new_architecture_first_token": 12_000.0,
    }
    rows = []
    for name, values in figures.ms.items():
        unit = "B" if name == "parked_device_bytes" else "ms"
        rows.append(cost_row(name, values, unit, allowed.get(name)))
    own = {
        "vllm_cold_first_token": [found["cold"]],
        "vllm_first_token": found["first_token"],
        "vllm_serve_first_token": found["serve"],
        "vllm_sleep1_wake_first_token": found["sleep1"],
        "vllm_sleep2_reload": found["sleep2"],
    }
    rows += [cost_row(name, [s * 1e3 for s in values], "ms") for name, values in own.items() if values]
    return rows


if __name__ == "__main__":
    main()
