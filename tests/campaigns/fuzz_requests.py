# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests changed at random, for a live torch engine: chats, completions and embeddings of every form.

Each answer is 2xx with the shape that OpenAI's have, or 4xx with OpenAI's error object and words. Anything else is a
finding: a 5xx, a bare phrase, an answer that never ends, an engine that died. Now and then the engine is asked what it
was asked at the beginning, and must answer as it did.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import httpx
from campaign import ROOT, Campaign, main

sys.path.insert(0, str(ROOT / "tests" / "engines"))

import small_models
from conftest import Resident

from flashd.engines.process import EngineProcess, Settings, torch_factory
from flashd.workers.torch import fields

CHAT, COMPLETION, EMBEDDING = fields.CHAT, fields.COMPLETION, fields.EMBEDDING
WHO = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 24}
HUNG_S = 60.0
SEEDS: dict[str, dict[str, Any]] = {
    CHAT: {**WHO, "max_tokens": 4},
    COMPLETION: {"prompt": "Who are you?", "max_tokens": 4},
    EMBEDDING: {"input": ["Hello", "Who are you?"]},
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-300, 1e300, 10**20, -(10**20), 10**400, "", "x", "\u0000", "\ud800",
    "é\u202e\U0001f600", "x " * 3000, [], [1], [[1, 2]], [[]], [0, 5, 300], [1 << 40], ["a", "b"], {}, {"a": 1},
    {"5": 1.5}, {"type": "text"}, {"type": "json_object"}, {"include_usage": True}, [{"role": "user", "content": "x"}],
    [{"type": "text", "text": "x"}], [{"type": "image_url", "image_url": {"url": "x"}}], "float", "base64", "none",
    "auto", float("nan"), float("inf"),
]  # fmt: skip
MESSAGES: list[Any] = [
    {"role": "assistant", "content": None}, {"role": "system", "content": []}, {"role": "tool", "content": "1"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, {"role": "user"}, 3, None,
    "x",
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "user", "content": "x", "name": "y", "refusal": None},
]  # fmt: skip


def run(campaign: Campaign) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-requests-") as folder:
        asyncio.run(_run(campaign, Path(folder)))


async def _run(campaign: Campaign, folder: Path) -> None:
    small_models.make_base(folder / "ada", hidden=128, layers=2)
    factory = torch_factory(Settings(sys.executable, folder, folder / "logs", 1, 8, 100.0))
    factory.begin()
    engine = factory.create()
    try:
        await engine.start(Resident(folder / "ada", folder / "checkpoint").binding())
        transport = httpx.AsyncHTTPTransport(uds=str(engine.socket_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=HUNG_S) as client:
            await _fuzz(campaign, engine, client)
    finally:
        await engine.stop()
        await factory.close()


async def _fuzz(campaign: Campaign, engine: EngineProcess, client: httpx.AsyncClient) -> None:
    first = _said(await client.post(CHAT, json=WHO))
    campaign.began = time.monotonic()  # the set-up does not count
    while campaign.goes_on():
        path = campaign.random.choice(list(SEEDS))
        body = _changed(campaign.random, path)
        campaign.count("executions")
        try:
            answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            campaign.count("answered" if answer.status_code == 200 else "refused")
            wrong = _wrong(answer)
        except httpx.HTTPError as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            campaign.finding(f"POST {path} {body[:500]!r}: {wrong[:500]}")
        if campaign.counts["executions"] % 50 == 0 or not campaign.goes_on():
            campaign.count("comparisons")
            if (again := _said(await client.post(CHAT, json=WHO))) != first:
                campaign.finding(f"the same question is answered with {again!r} after {first!r}")
    if engine.pid <= 0 or not Path(f"/proc/{engine.pid}").exists():
        campaign.finding("the engine has died")


def _changed(random: Random, path: str) -> bytes:
    body = copy.deepcopy(SEEDS[path])
    for _ in range(random.randint(1, 4)):
        names = [field.name for field in fields.TABLE.values() if path in field.paths] if random.random() < 0.9 else []
        name = random.choice([*names, "unknown", ""])
        body[name] = copy.deepcopy(random.choice(VALUES))
    if isinstance(body.get("messages"), list) and random.random() < 0.4:
        body["messages"].insert(random.randint(0, len(body["messages"])), copy.deepcopy(random.choice(MESSAGES)))
    raw = bytearray(json.dumps(body).encode())
    if random.random() < 0.1:
        for _ in range(random.randint(1, 5)):
            raw[random.randrange(len(raw))] = random.randrange(256)
    return bytes(raw)


def _wrong(answer: httpx.Response) -> str:
    """What is not as it is to be; empty if nothing."""
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            lines = [line for line in answer.text.split("\n\n") if line]
            events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            is_sound = lines[-1] == "data: [DONE]" and all("choices" in event for event in events)
            return "" if is_sound else answer.text
        found = answer.json()
        usage = found["usage"]
        is_sound = bool(found.get("choices") or found.get("data")) and all(count >= 0 for count in usage.values())
        return "" if is_sound and usage["prompt_tokens"] > 0 else answer.text
    if not 400 <= answer.status_code < 500:
        return f"{answer.status_code} {answer.text}"
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text}"
    is_sound = set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 2000
    return "" if is_sound else answer.text


def _said(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"]) if answer.status_code == 200 else answer.text


if __name__ == "__main__":
    main(run, whole_s=1800)
