# SPDX-License-Identifier: Apache-2.0
"""The prefix cache of a vLLM engine that is rebound.

A checkpoint finds the prefixes that it has computed itself, and no others."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Resident, http
from safetensors.torch import save_file
from vllm_greedy import PROMPTS
from vllm_python import VllmPython

from flashd.engines.engine import EngineOptions
from flashd.engines.process import EngineProcess
from flashd.engines.vllm_factory import VllmFactory

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]
Residents = dict[str, Resident]
Plain = dict[str, list[list[int]]]
BLOCK = 128  # tokens of a block of the cache on a CPU; only whole blocks are found again
COUNTS = EngineOptions(("--enable-prompt-tokens-details",))
LONG = PROMPTS[2]


@contextlib.asynccontextmanager
async def engine_with(
    factory: VllmFactory, resident: Resident, options: EngineOptions = COUNTS
) -> AsyncIterator[EngineProcess]:
    engine = factory.create(options)
    try:
        await engine.start(resident.binding())
        yield engine
    finally:
        await engine.stop()


@contextlib.asynccontextmanager
async def factory_like(factory: VllmFactory, **changes: Any) -> AsyncIterator[VllmFactory]:
    made = VllmFactory(dataclasses.replace(factory._settings, **changes), ())
    try:
        yield made
    finally:
        await made.close()


async def asked(engine: EngineProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with http(engine) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def answer(engine: EngineProcess, prompt: str = LONG, **more: Any) -> tuple[list[int], int]:
    """Returns an answer's tokens, and how many tokens of the prompt were found in the cache."""
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 16, "return_token_ids": True, **more}
    found = await asked(engine, "/v1/completions", body)
    return found["choices"][0]["token_ids"], cached(found["usage"])


def cached(usage: dict[str, Any]) -> int:
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
    return int(details.get("cached_tokens") or details.get("cache_read_input_tokens") or 0)


async def to(engine: EngineProcess, resident: Resident) -> None:
    await engine.drain(5)
    await engine.rebind(resident.binding())


async def test_a_model_that_comes_back_finds_its_prefix_and_no_others(
    vllm_factory: VllmFactory, residents: Residents, plain: Plain
) -> None:
    ada, bob = plain["ada"][2], plain["bob"][2]
    assert ada != bob
    async with engine_with(vllm_factory, residents["ada"]) as engine:
        assert await answer(engine) == (ada, 0)
        await to(engine, residents["bob"])
        assert await answer(engine) == (bob, 0)
        assert await answer(engine) == (bob, BLOCK)
        await to(engine, residents["ada"])
        assert await answer(engine) == (ada, BLOCK)
        await to(engine, residents["bob"])
        assert await answer(engine) == (bob, BLOCK)


INTERFACES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("/v1/completions", {"prompt": "One. " + LONG}),
    "tokens": ("/v1/completions", {"prompt": [5] * 140}),
    "several": ("/v1/completions", {"prompt": "Two. " + LONG, "n": 2, "temperature": 0.5}),
    "beams": ("/v1/completions", {"prompt": "Six. " + LONG, "n": 2, "use_beam_search": True, "max_tokens": 1}),
    "salted": ("/v1/completions", {"prompt": "One. " + LONG, "cache_salt": "mine"}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Three. " + LONG}]}),
    "responses": ("/v1/responses", {"input": "Four. " + LONG, "max_output_tokens": 8}),
    "messages": ("/v1/messages", {"model": "alias", "messages": [{"role": "user", "content": "Five. " + LONG}]}),
}


async def test_every_interface_takes_part(vllm_factory: VllmFactory, residents: Residents) -> None:
    async def counts(name: str) -> dict[str, int]:
        found = {}
        for what, (path, body) in INTERFACES.items():
            given = {"temperature": 0, **body, **({"model": name} if "model" in body else {})}
            given |= {} if path == "/v1/responses" or "max_tokens" in body else {"max_tokens": 8}
            found[what] = cached((await asked(engine, path, given))["usage"])
        return found

    async with engine_with(vllm_factory, residents["ada"]) as engine:
        first = await counts("ada")
        assert not any(first[what] for what in INTERFACES if what != "several"), first  # which find each other's
        again = await counts("ada")
        assert all(again[what] >= BLOCK for what in INTERFACES if what != "beams"), again
        await to(engine, residents["bob"])
        assert await counts("bob") == first
        await to(engine, residents["ada"])
        assert await counts("ada") == again


async def test_embeddings_take_part(vllm_factory: VllmFactory, residents: Residents) -> None:
    async def vector(engine: EngineProcess) -> list[float]:
        found = await asked(engine, "/v1/embeddings", {"input": LONG})
        return [float(number) for number in found["data"][0]["embedding"]]

    pools = EngineOptions(("--runner", "pooling"))
    async with engine_with(vllm_factory, residents["bob"], pools) as engine:
        bob = await vector(engine)
    async with engine_with(vllm_factory, residents["ada"], pools) as engine:
        ada = await vector(engine)
        await to(engine, residents["bob"])
        assert await vector(engine) == pytest.approx(bob, abs=1e-4) != pytest.approx(ada, abs=1e-2)
        await to(engine, residents["ada"])
        assert await vector(engine) == pytest.approx(ada, abs=1e-4)


async def test_a_parked_engine_has_no_prefixes(vllm_factory: VllmFactory, residents: Residents, plain: Plain) -> None:
    """Its KV cache is gone, whatever the blocks were called."""
    async with engine_with(vllm_factory, residents["ada"]) as engine:
        for _ in range(2):
            assert await answer(engine) == (plain["ada"][2], 0)
            assert await answer(engine) == (plain["ada"][2], BLOCK)
            await engine.drain(5)
            await engine.park()
            await engine.wake(residents["ada"].binding())


async def test_a_request_that_vllm_still_has_costs_the_prefixes(
    vllm_factory: VllmFactory, residents: Residents, plain: Plain
) -> None:
    """It would compute the rest with the other weights, under the salt of the first."""
    stores = {**(vllm_factory._settings.environment or {}), "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    async with (
        factory_like(vllm_factory, environment=stores) as factory,
        engine_with(factory, residents["ada"]) as engine,
    ):
        assert await answer(engine) == (plain["ada"][2], 0)
        body = {"input": "Count.", "background": True, "max_output_tokens": 480, "store": True}
        for _ in range(5):
            left = await asked(engine, "/v1/responses", body)
            assert left["status"] in ("queued", "in_progress")
            await to(engine, residents["bob"])
            assert (await answer(engine))[0] == plain["bob"][2]
            await to(engine, residents["ada"])
            tokens, found = await answer(engine)
            assert tokens == plain["ada"][2]
            if not found:
                break  # on a busy machine vLLM may have answered before the rebind, which then costs nothing
        else:
            raise AssertionError("the prefixes were kept in spite of the request")


def adapter(folder: Path, seed: int) -> None:
    """Writes an adapter for Ada, with random factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        factors[f"{name}.lora_A.weight"] = torch.randn(8, 64, generator=generator)
        factors[f"{name}.lora_B.weight"] = torch.randn(64, 8, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "ada"}))


async def test_an_adapter_finds_its_own_prefix_until_it_changes(
    vllm_factory: VllmFactory, residents: Residents, plain: Plain, tmp_path: Path
) -> None:
    adapter(tmp_path / "tuned", 1)
    options = {**vllm_factory._settings.options, "adapters": [str(tmp_path / "tuned")]}
    async with (
        factory_like(vllm_factory, options=options) as factory,
        engine_with(factory, residents["ada"]) as engine,
    ):
        assert await answer(engine) == (plain["ada"][2], 0)
        first, found = await answer(engine, model="tuned")
        assert first != plain["ada"][2] and found == 0
        await to(engine, residents["bob"])
        await to(engine, residents["ada"])
        assert await answer(engine, model="tuned") == (first, BLOCK)
        adapter(tmp_path / "tuned", 2)
        await to(engine, residents["bob"])
        await to(engine, residents["ada"])
        second, found = await answer(engine, model="tuned")
        assert second != first and found == 0
        assert await answer(engine) == (plain["ada"][2], BLOCK)


_KEEPS = """
from types import SimpleNamespace as Config
from flashd.workers.vllm import compat

def keeps(ranks=1, **more):
    cache = Config(calculate_kv_scales=more.pop("scaled", False))
    return compat.keeps_prefixes(Config(cache_config=cache, parallel_config=Config(data_parallel_size=ranks), **more))

print("KEEPS", keeps(), keeps(weight_transfer_config=None))
print("DROPS", keeps(weight_transfer_config="nccl"), keeps(scaled=True), keeps(ranks=2))
"""


async def test_prefixes_that_a_checkpoints_id_does_not_name_are_dropped(vllm: VllmPython) -> None:
    done = vllm.run(_KEEPS)
    assert done.stdout.splitlines()[-2:] == ["KEEPS True True", "DROPS False False False"]
