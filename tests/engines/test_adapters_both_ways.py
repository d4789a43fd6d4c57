# SPDX-License-Identifier: Apache-2.0
"""Adapters merged into a model of their own, or applied to their base by the engine: both give the same answers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import flashtensors as ft
import pytest
import torch
from gateways import running_gateway
from personas import ADA, BOB, QUESTION
from running import CONFIG, Daemon
from safetensors.torch import load_file, save_file
from vllm_python import VllmPython

import flashd
from flashd import Client, errors
from flashd.checkpoint.lora.applied import AppliedAdapter
from flashd.client import openai
from flashd.dbus.private_bus import PrivateBus
from flashd.workers.vllm import adapters

pytestmark = pytest.mark.timeout(300)
RANK = 32
ASK = [{"role": "user", "content": QUESTION}]
GREEDY = SimpleNamespace(temperature=0, max_tokens=40)


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """As vllm.lora.request has it, which is not in this environment."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture(scope="module")
def adapter(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes Ada say what Bob says: the difference of their matrices, as far as some ranks go."""
    ada, bob = (load_file(made / name / "model.safetensors") for name in ("ada", "bob"))
    factors = {}
    for name in ada:
        if name.endswith("_proj.weight"):
            rows, scales, columns = torch.linalg.svd(bob[name].float() - ada[name].float(), full_matrices=False)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = columns[:RANK].contiguous()
            factors[f"{module}.lora_B.weight"] = (rows * scales)[:, :RANK].contiguous()
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in factors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "ada"}))
    return folder


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[Client]:
    with flashd.connect(daemon.address) as client:
        yield client


@pytest.fixture(scope="module")
def daemon(made: Path, adapter: Path, imported_vllm: str, compiled: Path) -> Iterator[Daemon]:
    """A daemon whose vLLM applies the adapter where it is asked for it."""
    with (
        tempfile.TemporaryDirectory(prefix="fd-") as folder,
        PrivateBus(Path(folder)) as bus,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setenv("FLASHD_BUS_ADDRESS", bus.address)
        daemon = Daemon(bus.address, Path(folder), Path(folder))
        settings = f"python = '{imported_vllm}'\nkv_cache = '64MiB'\nadapters = ['{adapter}']\n"
        models = "[models.ada]\nengine = 'vllm'\n[models.bob]\nengine = 'vllm'\n"
        daemon.config.write_text(f"{CONFIG}[engines.vllm]\n{settings}{models}")
        daemon.share_compiled(compiled)
        daemon.start()
        try:
            with flashd.connect(bus.address) as client:
                for name in ("ada", "bob"):
                    client.import_(made / name, name)
            yield daemon
        finally:
            status, words = daemon.stop(), daemon.log.read_text()
    assert status == 0 and "Traceback" not in words, words


def test_merged_it_is_a_model_like_any_other(client: Client, adapter: Path) -> None:
    client.import_(adapter, "merged")
    for engine in ("torch", "vllm"):
        client.swap("merged", engine=engine)
        assert client.chat("merged", ASK, temperature=0) == BOB.introduction


def test_vllm_applies_it_beside_its_base(client: Client) -> None:
    """One engine, one copy of the base, and no swap between them; and no worse after others had the engine."""
    ada, tuned = ft.load_model("ada", backend="vllm"), LoRARequest("tuned", 1, "")
    for disturb in (lambda: None, lambda: client.swap("bob"), client.park):
        disturb()
        assert [output.outputs[0].text for output in ada.chat([ASK] * 2, GREEDY)] == [ADA.introduction] * 2
        assert ada.chat(ASK, GREEDY, lora_request=tuned)[0].outputs[0].text == BOB.introduction
    assert len([engine for engine in client.engines() if engine.kind == "vllm"]) == 1
    assert openai.chat(client.status().endpoint, "tuned", ASK, temperature=0) == BOB.introduction
    flash = [Path(sys.executable).with_name("flash"), "run", QUESTION, "--temperature", "0", "--engine", "vllm"]
    for asked, persona in ((["ada", "--adapter", "tuned"], BOB), (["tuned"], BOB), (["ada"], ADA)):
        done = subprocess.run(
            [*flash[:2], asked[0], *flash[2:], *asked[1:]], capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == persona.introduction, done.stderr


async def test_the_gateway_has_its_base_serve_and_asks_it_by_name(client: Client, daemon: Daemon) -> None:
    """Requests for three names come mixed: two models by turns, and the adapter with its base."""
    says = {"ada": ADA.introduction, "bob": BOB.introduction, "tuned": BOB.introduction}
    client.park()
    async with (
        running_gateway(daemon, daemon.root / "gateway.log", daemon.root / "gateway.sock") as gateway,
        gateway.openai() as asks,
        gateway.anthropic() as messages,
    ):
        entries = {model.id: model async for model in await asks.models.list()}
        assert entries["tuned"].model_extra["parent"] == "ada"

        async def said(name: str) -> str:
            answer = await asks.chat.completions.create(model=name, messages=ASK, temperature=0, max_tokens=40)
            assert answer.model == name
            return str(answer.choices[0].message.content)

        assert await said("tuned") == BOB.introduction, "it is the first to ask, and its base does not serve"
        names = ("ada", "tuned", "bob") * 4
        assert await asyncio.gather(*map(said, names)) == [says[name] for name in names]
        answer = await messages.messages.create(
            model="tuned", messages=ASK, max_tokens=40, extra_body={"temperature": 0}
        )
        assert answer.content[0].text == BOB.introduction


def test_it_serves_by_itself_in_python(client: Client) -> None:
    client.swap("bob")
    client.stop_engine(client.engines()[0])
    assert client.chat("tuned", ASK, temperature=0) == BOB.introduction
    with pytest.raises(errors.NotFound):
        client.chat("tune", ASK)


def test_it_is_there_only_while_its_base_is(client: Client) -> None:
    """One engine serves both models, and would apply it to either."""
    tuned = LoRARequest("tuned", 1, "")
    for name, others in (("ada", {"tuned"}), ("bob", set()), ("ada", {"tuned"})):
        client.swap(name, engine="vllm")
        assert {model["id"] for model in openai.models(client.status().endpoint)} == {name, *others}
    bob = ft.load_model("bob", backend="vllm")
    with pytest.raises(errors.Unsupported, match="'tuned'"):
        bob.chat(ASK, GREEDY, lora_request=tuned)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "cannot be read"),
        ("[]", "lacks a base"),
        ('{"r": 8}', "lacks a base"),
        ("{", "cannot be read"),
        *((json.dumps({"base_model_name_or_path": "ada", "r": rank}), "or a rank") for rank in (10**400, 0, -1, 2.5)),
    ],
)
def test_a_setting_that_names_no_adapter_is_told(config: str | None, words: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(errors.EngineFailed, match=words) as failed:
        AppliedAdapter.read(f"mine={tmp_path}")
    assert "engines.vllm.adapters" in failed.value.hint


@pytest.mark.parametrize(
    ("base", "names", "is_of"),
    [
        ("Qwen/Qwen3-8B", ["Qwen/Qwen3-8B"], True), ("/home/you/models/Ada", ["ada"], True),
        ("/x/hub/models--Qwen--Qwen3-8B/snapshots/1f", ["qwen3-8b"], True), ("ada", ["bob", "me/ada"], True),
        ("ada", ["bob"], False), ("Qwen/Qwen3-8B", ["Qwen/Qwen3-14B"], False), ("/x/ada/checkpoint-10", ["ada"], True),
    ],
)  # fmt: skip
def test_a_base_is_known_by_what_its_trainer_was_started_with(
    base: str, names: list[str], is_of: bool, tmp_path: Path
) -> None:
    config = {"base_model_name_or_path": base, "r": 4, "rank_pattern": {"q_proj": 40}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = AppliedAdapter.read(str(tmp_path))
    assert found.name == tmp_path.name and found.is_of(names) is is_of
    assert list(adapters.arguments([found]))[:3] == ["--enable-lora", "--max-lora-rank", "64"]
    assert list(adapters.arguments([])) == []


def test_an_adapter_that_the_engine_does_not_have_is_told_at_once(client: Client) -> None:
    ada = ft.load_model("ada", backend="vllm")
    with pytest.raises(errors.Unsupported, match="'other'") as failed:
        ada.generate("Hello", GREEDY, lora_request=LoRARequest("other", 2, "/nowhere"))
    assert "engines.vllm.adapters" in failed.value.hint
    with pytest.raises(errors.InvalidArgument, match="LoRARequest"):
        ada.generate("Hello", GREEDY, lora_request="tuned")
    client.swap("ada", engine="torch")
    with pytest.raises(errors.Unsupported, match="'tuned'"):
        ft.load_model("ada").generate("Hello", GREEDY, lora_request=LoRARequest("tuned", 1, ""))


def test_on_a_gpu_an_engine_that_has_adapters_is_not_parked(vllm: VllmPython) -> None:
    """vLLM's sleep drops their weights as well, and its wake brings none back."""
    code = """
import torch
from flashd.workers.vllm.extension import Extension
extension = Extension()
extension.device, extension.lora_config = torch.device("cuda"), object()
extension.flashd_park()
"""
    done = vllm.run(code)
    assert done.stderr.splitlines()[-1].startswith("flashd.errors.Unsupported: adapters"), done.stderr


def test_peft_applies_it_to_a_model_over_the_daemons_memory(client: Client, adapter: Path, made: Path) -> None:
    """Of any kind that PEFT knows, and the base's pages stay the daemon's."""
    from peft import PeftModel  # seconds, which every process that collects tests would pay
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(ft.load_model("ada", backend="transformers"), adapter)
    tokenizer = AutoTokenizer.from_pretrained(made / "ada")
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def said() -> str:
        out = tuned.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    assert said() == BOB.introduction
    with tuned.disable_adapter():
        assert said() == ADA.introduction
