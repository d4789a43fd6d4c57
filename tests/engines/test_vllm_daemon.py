# SPDX-License-Identifier: Apache-2.0
"""vLLM with a running daemon: one started by hand takes its weights by lease; one of the daemon's is swapped to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import plain_vllm
from small_models import ADA, BOB, QUESTION
from vllm_greedy import PROMPTS

import flashd
from flashd import Client
from flashd.compat.language_model import LanguageModel
from flashd.errors import Unavailable
from flashd.private_bus import PrivateBus

pytestmark = pytest.mark.timeout(300)
ASK = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def bus() -> Iterator[tuple[str, Path]]:
    """A daemon whose inbox is empty, and the folder it keeps everything in."""
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        yield bus.address, Path(folder)


@pytest.fixture(scope="module")
def client(bus: tuple[str, Path], made: Path, vllm_python: str) -> Iterator[Client]:
    address, root = bus
    (root / "models").mkdir()
    (root / "flashd.toml").write_text(
        "[engines]\nwarm_up = false\nwarm_new = false\ndefault = 'vllm'\n"
        f"[engines.vllm]\npython = '{vllm_python}'\nkv_cache = '64MiB'\narguments = ['--seed', '0']\n"
    )
    command = [sys.executable, "-m", "flashd.daemon.main", "--bus", address, "--config", root / "flashd.toml"]
    folders = ["--state-dir", root / "state", "--models-dir", root / "models", "--runtime-dir", root / "run"]
    with (root / "log").open("wb") as log, subprocess.Popen([*command, *folders], stdout=log, stderr=log) as daemon:
        try:
            with connected(address) as client:
                for name in ("ada", "bob", "llama"):
                    client.import_(made / name, name)
                yield client
        finally:
            daemon.send_signal(signal.SIGTERM)
            status = daemon.wait(20)
    words = (root / "log").read_text()
    assert status == 0 and "Traceback" not in words, words


def connected(address: str) -> Client:
    for _ in range(200):
        try:
            return flashd.connect(address)
        except Unavailable:
            time.sleep(0.1)
    raise AssertionError("the daemon did not come")


def test_a_vllm_started_by_hand_answers_as_with_its_own_loader(
    bus: tuple[str, Path], client: Client, vllm_python: str, compiled: Path, made: Path, plain: dict[str, Any]
) -> None:
    def job(folder: str, **extra: str) -> dict[str, Any]:
        options = {"bus": bus[0], **extra}
        return {"model": str(made / folder), "load_format": "flash", "model_loader_extra_config": options}

    jobs = [
        *(job(name, model=name) for name in ("ada", "bob", "llama")),
        job("ada", model="bob"),
        job("ada"),  # the daemon was handed files, not this folder
        job("ada", model="nobody"),
        job("ada", modell="ada"),
        job("ada", bus="unix:path=/nonexistent"),
    ]
    found = plain_vllm(vllm_python, compiled, jobs)
    assert found[:4] == [plain["ada"], plain["bob"], plain["llama"], plain["bob"]]
    assert found[4].startswith("NotFound") and "flash import" in found[4]
    assert found[5].startswith("NotFound") and "nobody" in found[5]
    assert found[6].startswith("InvalidArgument") and "modell" in found[6]
    assert found[7].startswith("Unavailable")
    assert all(model.leases == 0 for model in client.models()), "what is loaded needs no lease any more"


def test_swaps_between_models_and_kinds_of_engine(client: Client) -> None:
    hows = []
    for name, kind, persona in (
        ("ada", "", ADA),
        ("bob", "", BOB),
        ("bob", "torch", BOB),
        ("bob", "", BOB),  # is active, in whichever engine
        ("ada", "vllm", ADA),
        ("ada", "", ADA),
    ):
        outcome = client.swap(name, engine=kind)
        assert client.chat(name, ASK, temperature=0) == persona.introduction
        hows.append(outcome.how)
    assert hows == ["start", "rebind", "start", "already-active", "wake", "already-active"]
    assert {engine.kind: engine.state for engine in client.engines()} == {"vllm": "serving", "torch": "parked"}


def test_asked_as_vllm_is_it_says_what_vllm_says(bus: tuple[str, Path], client: Client, plain: dict[str, Any]) -> None:
    models = {name: LanguageModel(lambda: flashd.connect(bus[0]), name, "vllm") for name in ("ada", "bob")}
    greedy = SimpleNamespace(temperature=0, max_tokens=16)
    for name in ("ada", "bob", "ada"):
        found = models[name].generate(PROMPTS, greedy)
        assert [output.outputs[0].token_ids for output in found] == plain[name]
        assert all(output.prompt_token_ids for output in found)
        ids = [output.prompt_token_ids for output in found]
        assert [output.outputs[0].token_ids for output in models[name].generate(ids, greedy)] == plain[name]


def test_vllms_further_parameters(bus: tuple[str, Path], client: Client) -> None:
    model = LanguageModel(lambda: flashd.connect(bus[0]), "ada", "vllm")
    (several,) = model.generate("I am", SimpleNamespace(n=3, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True))
    assert [output.index for output in several.outputs] == [0, 1, 2]
    assert {len(output.token_ids) for output in several.outputs} == {4}
    (told,) = model.generate("I am", SimpleNamespace(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1))
    answer = told.outputs[0]
    assert answer.logprobs is not None and answer.cumulative_logprob is not None and told.prompt_logprobs is not None
    chosen = [among[token].logprob for among, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert sum(chosen) == pytest.approx(answer.cumulative_logprob) and all(len(among) >= 2 for among in answer.logprobs)
    assert told.prompt_logprobs[0] is None and len(told.prompt_logprobs) == len(told.prompt_token_ids or [])
    (stopped,) = model.generate("I am", SimpleNamespace(temperature=0, max_tokens=40, stop=["."]))
    assert stopped.outputs[0].stop_reason == "." and stopped.outputs[0].text == ""
    unlimited = model.generate("I am Ada", SimpleNamespace(temperature=0, max_tokens=None))[0].outputs[0]
    assert unlimited.finish_reason == "stop" or len(unlimited.token_ids) > 100
    (plain,) = model.generate("I am")
    assert len(plain.outputs[0].token_ids) <= 16


def test_an_engine_that_dies_is_brought_back_with_its_model(client: Client) -> None:
    client.swap("ada", engine="vllm")
    (engine,) = [engine for engine in client.engines() if engine.state == "serving"]
    os.kill(engine.pid, signal.SIGKILL)
    for _ in range(600):
        back = [other for other in client.engines() if other.state == "serving" and other.pid != engine.pid]
        if back:
            break
        time.sleep(0.1)
    assert [other.kind for other in back] == ["vllm"]
    assert client.chat("ada", ASK, temperature=0) == ADA.introduction
