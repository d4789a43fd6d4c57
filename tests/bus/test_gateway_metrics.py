# SPDX-License-Identifier: Apache-2.0
"""The gateway's metrics while real engines answer, as Prometheus reads them."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest
from conftest import SAYS, Remote, import_model
from gateways import WHO, Gateway
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE_S, eventually

from flashd.dbus import wire
from flashd.gateway.tokens import PREFIX, TokenFile

CHAT = "/v1/chat/completions"
Samples = dict[tuple[str, ...], float]


@pytest.fixture
async def two(remote: Remote, sources: Path) -> Remote:
    for name in ("ada", "bob"):
        await import_model(remote, sources / name, name)
    return remote


async def read(client: httpx.AsyncClient, **headers: str) -> Samples:
    answer = await client.get("/metrics", headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {(each.name, *(value for _, value in sorted(each.labels.items()))): each.value for each in samples}


def over(gateway: Gateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S)


async def test_what_engines_answer_is_counted(two: Remote, gateway: Gateway) -> None:
    usage = {"include_usage": True}
    async with gateway.openai() as asks, gateway.ollama() as ollamas, over(gateway) as client:
        whole = await asks.chat.completions.create(model="ada", messages=WHO, temperature=0, max_tokens=40)
        stream = await asks.chat.completions.create(
            model="ada", messages=WHO, temperature=0, max_tokens=40, stream=True, stream_options=usage
        )
        last = [chunk async for chunk in stream][-1].usage
        by_ollama = await ollamas.chat("bob", WHO, options={"temperature": 0, "num_predict": 40})
        with pytest.raises(openai.NotFoundError):
            await asks.chat.completions.create(model="nobody has it", messages=WHO)
        with pytest.raises(openai.BadRequestError):
            await asks.chat.completions.create(model="ada", messages=WHO, temperature=-1)

        async def are_counted() -> bool:  # an answer is counted a moment after its last byte
            found = await read(client)
            return found.get(("flashd_requests_total", CHAT, "ada", "400"), 0) == 1

        await eventually(are_counted)

        async def are_measured() -> bool:  # by the daemon, every few seconds
            return (await read(client)).get(("flashd_engine_bytes", "ada", "host"), 0) > 0

        await eventually(are_measured)
        found = await read(client)
    assert whole.usage is not None and last is not None
    prompts, completions = 2 * last.prompt_tokens, 2 * last.completion_tokens
    assert found["flashd_tokens_total", "prompt", "ada"] == prompts
    assert found["flashd_tokens_total", "completion", "ada"] == completions
    assert found["flashd_tokens_total", "completion", "bob"] == by_ollama.eval_count
    assert found["flashd_requests_total", CHAT, "ada", "200"] == 2
    assert found["flashd_requests_total", CHAT, "", "404"] == 1
    assert found["flashd_requests_total", "/api/chat", "bob", "200"] == 1
    assert found["flashd_refusals_total", "NotFound"] == 1 and found["flashd_refusals_total", "engine"] == 1
    assert found["flashd_queue_wait_seconds_sum", "ada"] > 0.05, "the first had to wait for an engine to start"
    assert found["flashd_time_to_first_byte_seconds_count", "ada"] == 3
    assert found["flashd_swap_duration_seconds_count", "start", "stored"] == 1
    assert found["flashd_swap_duration_seconds_count", "rebind", "stored"] == 1
    assert found["flashd_jobs_total", "serve", "done"] >= 2
    assert found["flashd_model_serving", "ada"] == 1 and found["flashd_engines", "torch", "serving"] == 1
    assert found["flashd_model_bytes", "bob", "host"] == found["flashd_model_bytes", "bob", "stored"] > 0
    assert ("flashd_engine_bytes", "bob", "host") not in found, "the engine holds ada again"
    assert found["flashd_engine_bytes", "ada", "device"] == found["flashd_kv_cache_bytes", "ada"] == 0
    assert found["flashd_device_used_bytes", "host"] >= found["flashd_model_bytes", "bob", "host"]
    assert found["flashd_store_bytes",] > 0 and found["flashd_request_bodies_bytes",] == 0
    assert not [labels for labels in found if "nobody has it" in labels]


async def test_evictions_and_swaps_of_others_are_counted(two: Remote, gateway: Gateway) -> None:
    (job,) = await two.call("Swap", "sa{sv}", "bob", {})
    assert (await two.finished(job))["State"] == "done"
    (job,) = await two.call("Load", "ssa{sv}", "ada", "host", {})
    assert (await two.finished(job))["State"] == "done"
    await two.call("Evict", path=wire.model_path("ada"), interface=wire.MODEL)
    async with over(gateway) as client:

        async def is_counted() -> bool:
            return (await read(client)).get(("flashd_evictions_total", "host")) == 1

        async def is_listed_anew() -> bool:
            return ("flashd_model_bytes", "ada", "host") not in await read(client)

        await eventually(is_counted)
        await eventually(is_listed_anew)
        found = await read(client)
    assert found["flashd_jobs_total", "swap", "done"] == 1 and found["flashd_jobs_total", "load", "done"] == 1
    assert found["flashd_swap_duration_seconds_count", "start", "stored"] == 1


async def test_the_metrics_of_private_models_are_for_the_socket_alone(two: Remote, gateway: Gateway) -> None:
    await two.call("SetPrivate", "b", True, path=wire.model_path("bob"), interface=wire.MODEL)
    secret = TokenFile(gateway.tokens).new("laptop", ["ada"])
    transport = httpx.AsyncHTTPTransport(uds=str(gateway.socket_path))
    async with (
        over(gateway) as public,
        httpx.AsyncClient(transport=transport, base_url="http://flashd", timeout=PATIENCE_S) as own,
    ):
        body = {"model": "bob", "messages": WHO, "temperature": 0, "max_tokens": 40}

        async def is_known() -> bool:
            return "bob" not in (await public.get("/v1/models")).text

        await eventually(is_known)
        answer = (await own.post(CHAT, json=body)).json()
        assert answer["choices"][0]["message"]["content"] == SAYS["bob"]
        assert (await public.post(CHAT, json=body)).status_code == 404

        async def is_counted() -> bool:
            return ("flashd_requests_total", CHAT, "bob", "200") in await read(own)

        await eventually(is_counted)
        for headers in ({}, {"Authorization": f"Bearer {secret}"}):
            found = await read(public, **headers)
            assert found["flashd_model_bytes", "ada", "stored"] > 0
            assert not [labels for labels in found if "bob" in labels]
        for headers in ({"Origin": "https://evil.example"}, {"Authorization": f"Bearer {PREFIX}unknown"}):
            assert (await public.get("/metrics", headers=headers)).status_code in {401, 403}
