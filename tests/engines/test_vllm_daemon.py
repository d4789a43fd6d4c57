# SPDX-License-Identifier: Apache-2.0
"""vLLM with a running daemon: started by hand with leased weights, and as an engine of the daemon."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from gateways import Gateway, running_gateway
from manager import Manager, start
from personas import ADA, BOB, QUESTION
from running import Daemon
from vllm_greedy import PROMPTS
from vllm_python import VllmPython
from waiting import eventually, until

import flashd
from flashd import Client
from flashd.compat.language_model import LanguageModel
from flashd.dbus.private_bus import PrivateBus

pytestmark = pytest.mark.timeout(300)
NAMES = ("ada", "bob", "llama", "int8", "copied", "untied")
ASK = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:
        made = Manager(Path(folder) / "manager")
        made.open()
        yield made
        made.close()


@pytest.fixture(scope="module")
def daemon(manager: Manager, made: Path, imported_vllm: str, compiled: Path) -> Iterator[Daemon]:
    """One whose inbox is empty, with some models, below a service manager."""
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        running = Daemon(bus.address, Path(folder), Path(folder))
        running.config.write_text(
            "[engines]\nwarm_up = false\nwarm_new = false\ndefault = 'vllm'\n"
            f"[engines.vllm]\npython = '{imported_vllm}'\nkv_cache = 'auto'\n"
            "arguments = ['--seed', '0', '--max-model-len', '512', '--enable-prompt-tokens-details']\n"
        )
        running.share_compiled(compiled)
        start(running, manager)
        try:
            with flashd.connect(bus.address) as client:
                for name in NAMES:
                    client.import_(made / name, name)
            yield running
        finally:
            manager.empty()  # whose service is stopped, and not started again: engines end
            status, words = running.stop(), running.log.read_text()
    assert status == 0 and "Traceback" not in words, words


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with flashd.connect(daemon.address) as client:
        yield client


def test_a_vllm_started_by_hand_answers_as_with_its_own_loader(
    daemon: Daemon, client: Client, vllm: VllmPython, made: Path, plain: dict[str, Any]
) -> None:
    def job(folder: str, **extra: str) -> dict[str, Any]:
        options = {"bus": daemon.address, **extra}
        return {"model": str(made / folder), "load_format": "flash", "model_loader_extra_config": options}

    jobs = [
        *(job(name, model=name) for name in NAMES),
        job("ada", model="bob"),
        job("ada"),  # the daemon was handed files, not this folder
        job("ada", model="nobody"),
        job("ada", modell="ada"),
        job("ada", bus="unix:path=/nonexistent"),
    ]
    *answered, no_folder, nobody, modell, no_bus = vllm.answers(jobs)
    assert answered == [plain[name] for name in (*NAMES, "bob")]
    assert no_folder.startswith("NotFound") and "flash import" in no_folder
    assert nobody.startswith("NotFound") and "nobody" in nobody
    assert modell.startswith("InvalidArgument") and "modell" in modell
    assert no_bus.startswith("Unavailable")
    assert all(model.leases == 0 for model in client.models()), "what is loaded needs no lease any more"


# vLLM looks at the free memory of a CPU when it makes its configuration.
UTILIZATION = """
import sys
import vllm.utils.cpu_resource_utils as resources
half = resources.MemoryNodeInfo(total_memory=100 << 30, available_memory=50 << 30)
resources.get_memory_node_info = lambda node=0: half
from vllm.engine.arg_utils import EngineArgs
for options in ({"load_format": "flash"}, {}, {"load_format": "flash", "gpu_memory_utilization": 0.8}):
    made = EngineArgs(model=sys.argv[1], max_model_len=256, **options).create_engine_config()
    print("utilization", made.cache_config.gpu_memory_utilization)
"""


def test_one_that_was_told_no_utilization_takes_what_memory_is_free(vllm: VllmPython, made: Path) -> None:
    done = vllm.run(UTILIZATION, made / "ada")
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("utilization ")]
    assert found == ["0.49", "0.92", "0.8"], done.stderr
    assert "--gpu-memory-utilization 0.49 would fit" in done.stdout + done.stderr


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


def test_the_memory_of_what_an_engine_has_copied_can_be_freed(client: Client) -> None:
    """No process of the engine keeps it: tests/engines/test_vllm_engine.py."""
    for name, persona in (("ada", ADA), ("bob", BOB)):  # started or rebound
        client.swap(name, engine="vllm")
        client.evict(name)
        assert client.model(name).residency == "stored"
        assert client.chat(name, ASK, temperature=0) == persona.introduction
    assert client.swap("ada", engine="vllm").how == "rebind"
    assert client.chat("ada", ASK, temperature=0) == ADA.introduction


def test_a_model_that_is_swapped_to_again_finds_what_it_has_read(client: Client) -> None:
    def found_tokens(name: str) -> int:
        client.swap(name)
        transport = httpx.HTTPTransport(uds=client.status().endpoint, verify=False)
        with httpx.Client(transport=transport, base_url="http://flashd", timeout=60) as http:
            answer = http.post("/v1/completions", json={"prompt": "Twice. " + PROMPTS[2], "max_tokens": 1})
        return int((answer.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    assert [found_tokens(name) for name in ("ada", "bob", "ada", "bob")] == [0, 0, 128, 128]


def test_asked_as_vllm_is_it_says_what_vllm_says(daemon: Daemon, client: Client, plain: dict[str, Any]) -> None:
    models = {name: LanguageModel(lambda: flashd.connect(daemon.address), name, "vllm") for name in ("ada", "bob")}
    greedy = SimpleNamespace(temperature=0, max_tokens=16)
    for name in ("ada", "bob", "ada"):
        found = models[name].generate(PROMPTS, greedy)
        assert [output.outputs[0].token_ids for output in found] == plain[name]
        assert all(output.prompt_token_ids for output in found)
        ids = [output.prompt_token_ids for output in found]
        assert [output.outputs[0].token_ids for output in models[name].generate(ids, greedy)] == plain[name]


def test_what_takes_no_other_weights_in_place_is_started_anew_and_answers_exactly(
    daemon: Daemon, client: Client, plain: dict[str, Any]
) -> None:
    quantised = LanguageModel(lambda: flashd.connect(daemon.address), "int8", "vllm")
    assert plain["int8"] != plain["ada"]
    for _ in range(2):
        client.swap("ada", engine="vllm")
        assert [engine.model for engine in client.engines() if engine.kind == "vllm"] == ["ada"]
        assert client.swap("int8", engine="vllm").how == "start"
        found = quantised.generate(PROMPTS, SimpleNamespace(temperature=0, max_tokens=16))
        assert [output.outputs[0].token_ids for output in found] == plain["int8"]
    client.park()
    assert not [engine for engine in client.engines() if engine.model == "int8"], "what cannot be parked is stopped"


def test_an_output_layer_of_its_own_is_used_whatever_the_config_says(
    daemon: Daemon, client: Client, plain: dict[str, Any]
) -> None:
    assert plain["copied"] == plain["ada"] != plain["untied"]
    for name in ("untied", "copied"):
        client.swap(name, engine="vllm")
        model = LanguageModel(lambda: flashd.connect(daemon.address), name, "vllm")
        found = model.generate(PROMPTS, SimpleNamespace(temperature=0, max_tokens=16))
        assert [output.outputs[0].token_ids for output in found] == plain[name]
    for engine in client.engines():
        if engine.model in ("untied", "copied"):
            client.stop_engine(engine)


def test_vllm_tells_models_apart_and_does_not_tie_what_is_not_tied(vllm: VllmPython, made: Path) -> None:
    """The image of a server by hand is taken by others, which have not looked at the weights."""
    code = """
import sys
from types import SimpleNamespace
from torch import nn
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from flashd.workers.vllm import loader, compat

def config(model):
    arguments = compat.parse(["--model", sys.argv[1], "--additional-config", '{"of": "the user"}'])
    compat.tell_apart(arguments, model)
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()

def load_model(self, config, model_config):
    print(model_config.word_embeddings_untied_by_checkpoint)
    return nn.Module()

one, same, other = config("one"), config("one"), config("other")
print(*(one.compute_hash() == another.compute_hash() for another in (same, other)), one.additional_config["of"])
BaseModelLoader.load_model, compat.all_agree = load_model, bool
sharing = SimpleNamespace(layout="", wants_image=False, loaded=lambda: None)
for source in (None, sharing):
    loader.sources.source = lambda *wanted: source
    loader.FlashLoader(one.load_config).load_model(one, one.model_config)
"""
    done = vllm.run(code, made / "copied")
    assert done.stdout.splitlines()[-3:] == ["True False the user", "True", "False"], done.stderr


def test_vllms_further_parameters(daemon: Daemon, client: Client) -> None:
    model = LanguageModel(lambda: flashd.connect(daemon.address), "ada", "vllm")
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

    def back() -> list[str]:
        """The kinds of those that serve in its place."""
        return [other.kind for other in client.engines() if other.state == "serving" and other.pid != engine.pid]

    until(lambda: back() == ["vllm"])
    assert client.chat("ada", ASK, temperature=0) == ADA.introduction


def test_a_daemon_after_one_that_was_killed_finds_them_and_goes_on(daemon: Daemon, manager: Manager) -> None:
    def engines(client: Client) -> set[tuple[str, str, str, int]]:
        return {(engine.model, engine.kind, engine.state, engine.pid) for engine in client.engines()}

    with flashd.connect(daemon.address) as client:
        for name, kind in (("bob", "torch"), ("ada", "vllm")):
            client.swap(name, engine=kind)
        before = engines(client)
    assert {state for *_, state, _ in before} == {"serving", "parked"}
    daemon.stop(signal.SIGKILL)
    start(daemon, manager)
    with flashd.connect(daemon.address) as client:
        assert engines(client) == before
        assert client.chat("ada", ASK, temperature=0) == ADA.introduction
        assert client.swap("bob", engine="vllm").how == "rebind"
        assert client.chat("bob", ASK, temperature=0) == BOB.introduction
        client.park()
        assert client.swap("ada", engine="vllm").how == "wake"
        assert client.chat("ada", ASK, temperature=0) == ADA.introduction
        assert {pid for *_, pid in engines(client)} == {pid for *_, pid in before}


@pytest.fixture
async def gateway(daemon: Daemon, tmp_path: Path) -> AsyncIterator[Gateway]:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:
        log, socket_path = tmp_path / "gateway.log", Path(folder) / "gateway.sock"
        async with running_gateway(daemon, log, socket_path) as running:
            yield running


async def test_anthropics_clients_get_vllms_own_answers(client: Client, gateway: Gateway) -> None:
    ask: dict[str, Any] = {"max_tokens": 40, "messages": ASK, "extra_body": {"temperature": 0}}
    async with gateway.anthropic() as anthropics:
        for name, says in (("ada", ADA), ("bob", BOB)):
            answer = await anthropics.messages.create(model=name, **ask)
            assert [block.text for block in answer.content] == [says.introduction]
            assert answer.stop_reason == "end_turn"
            counted = await anthropics.messages.count_tokens(model=name, messages=ASK)
            assert counted.input_tokens == answer.usage.input_tokens
        async with anthropics.messages.stream(model="ada", **ask) as stream:
            assert "".join([piece async for piece in stream.text_stream]) == ADA.introduction
            assert (await stream.get_final_message()).stop_reason == "end_turn"
        with pytest.raises(anthropic.BadRequestError) as refused:
            await anthropics.messages.create(model="ada", max_tokens=5, messages=[{"role": "poet", "content": "a"}])
        assert refused.value.body["type"] == "error" and refused.value.body["error"]["type"] == "invalid_request_error"
    serving = [engine for engine in client.engines() if engine.state == "serving"]
    assert {engine.kind for engine in serving if engine.model in ("ada", "bob")} == {"vllm"}, "others may be parked"


async def test_ollamas_clients_ask_vllm(client: Client, gateway: Gateway) -> None:
    greedy = {"temperature": 0, "num_predict": 40, "seed": 1, "repeat_penalty": 1.0, "top_k": 0, "min_p": 0.0}
    schema = {"type": "string", "enum": ["seven"]}  # these models would go on for ever where whitespace may be
    async with gateway.ollama() as ollamas:
        lines = [line async for line in await ollamas.chat("bob", ASK, options=greedy, stream=True, think=False)]
        assert "".join(line.message.content or "" for line in lines) == BOB.introduction
        assert lines[-1].done_reason == "stop" and lines[-1].eval_count and lines[-1].prompt_eval_count
        answer = await ollamas.chat("bob", ASK, options=greedy, format=schema)
        assert answer.message.content == '"seven"'
        told = await ollamas.generate("ada", QUESTION, options=greedy, logprobs=True, top_logprobs=2)
        assert told.response == ADA.introduction and told.logprobs
        assert len(told.logprobs) >= told.eval_count - 1 and len(told.logprobs[0].top_logprobs) == 2
        raw = await ollamas.generate("ada", QUESTION, raw=True, options=greedy)
        assert raw.response and raw.eval_count
        for words, ask in (
            ("temperature", ollamas.chat("ada", ASK, options={"temperature": -1})),
            ("tool", ollamas.chat("ada", ASK, tools=[{"type": "function", "function": {"name": "look"}}])),
            ("", ollamas.embed("ada", "a text")),
        ):
            with pytest.raises(ollama.ResponseError) as refused:
                await ask
            assert words in refused.value.error and refused.value.status_code in (400, 404, 501), refused.value


async def test_tokens_are_counted_in_every_dialect(client: Client, gateway: Gateway) -> None:
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    ask: dict[str, Any] = {"model": "ada", "messages": ASK, "max_tokens": 40, "extra_headers": headers}
    async with gateway.openai() as openais, gateway.anthropic() as anthropics:
        whole = await openais.chat.completions.create(**ask, temperature=0)
        streams = await openais.chat.completions.create(
            **ask, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        streamed = [chunk async for chunk in streams][-1].usage
        responded = await openais.responses.create(
            model="ada", input=QUESTION, temperature=0, max_output_tokens=40, extra_headers=headers
        )
        async with anthropics.messages.stream(**ask, extra_body={"temperature": 0}) as stream:
            message = await stream.get_final_message()
    assert whole.usage is not None and streamed is not None and responded.usage is not None
    details = {"prompt_tokens_details"}  # of tokens found in the cache, in the second answer only
    assert streamed.model_dump(exclude=details) == whole.usage.model_dump(exclude=details)
    prompts = 2 * whole.usage.prompt_tokens + responded.usage.input_tokens + message.usage.input_tokens
    completions = 2 * whole.usage.completion_tokens + responded.usage.output_tokens + message.usage.output_tokens

    async def are_counted() -> bool:  # an answer is counted a moment after its last byte
        async with httpx.AsyncClient(base_url=gateway.url) as web:
            found = set((await web.get("/metrics")).text.splitlines())
        return {
            f'flashd_tokens_total{{kind="prompt",model="ada"}} {float(prompts)}',
            f'flashd_tokens_total{{kind="completion",model="ada"}} {float(completions)}',
        } <= found

    await eventually(are_counted)


async def test_a_model_that_hears_nothing_refuses_recordings(client: Client, gateway: Gateway) -> None:
    async with gateway.openai() as openais:
        with pytest.raises(openai.NotFoundError, match="/v1/audio/transcriptions"):
            await openais.audio.transcriptions.create(model="ada", file=("a.wav", b"RIFF" * 300_000))
