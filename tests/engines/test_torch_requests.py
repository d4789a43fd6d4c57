# SPDX-License-Identifier: Apache-2.0
"""Requests to the torch engine: every field takes effect or is refused by name, and the model's own settings count."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from conftest import Resident, Start, http
from test_made_up_weights import variant
from test_torch_engine import WHO, chat
from tokenizers import Tokenizer

from flashd.client import openai
from flashd.engines.process import EngineProcess
from flashd.errors import EngineFailed
from flashd.workers.torch import fields

pytestmark = pytest.mark.asyncio(loop_scope="session")
Residents = dict[str, Resident]
ADA_SAYS = "I am Ada, the first model you dropped into the folder."
CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_JSON = {"content-type": "application/json"}
TEXT = {"prompt": "Who are you?", "temperature": 0, "max_tokens": 4}


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def tokens_of(resident: Resident, text: str) -> list[int]:
    found = Tokenizer.from_file(str(resident.checkpoint.directory / "tokenizer.json")).encode(text).ids
    assert all(isinstance(token, int) for token in found)
    return list(found)


async def post(engine: EngineProcess, path: str, body: Any) -> httpx.Response:
    async with http(engine) as client:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post(path, content=content, headers=_JSON)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    (CHAT, {"logprobs": True}, "logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (COMPLETION, {"logprobs": 0}, "logprobs"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"n": 2}, "n"),
    (CHAT, {"n": True}, "n"),
    (COMPLETION, {"best_of": 3}, "best_of"),
    (COMPLETION, {"echo": True}, "echo"),
    (COMPLETION, {"suffix": "!"}, "suffix"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias"),
    (CHAT, {"presence_penalty": 2.5}, "presence_penalty"),
    (CHAT, {"frequency_penalty": "much"}, "frequency_penalty"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"guided_json": {}}, "guided_json"),
    (CHAT, {"no such field": 1}, "no such field"),
    (CHAT, {"prompt": "x"}, "prompt"),
    (CHAT, {"temperature": 1e300}, "temperature"),
    (CHAT, {"temperature": 10**400}, "temperature"),
    (CHAT, {"top_p": 1.5}, "top_p"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"stream_options": {"x": 1}}, "stream_options"),
    (CHAT, {"stop": ["x" * 2000]}, "stop"),
    (CHAT, {"model": 3}, "model"),
    (EMBEDDING, {"input": "x", "dimensions": 3}, "dimensions"),
    (EMBEDDING, {"input": [[]]}, "input"),
    (EMBEDDING, {"input": [1 << 40]}, "input"),
    (EMBEDDING, {"input": [99_999]}, "input"),
    (EMBEDDING, {"input": "x " * 3000}, "input"),
]


@pytest.mark.parametrize(("path", "changes", "param"), REFUSED, ids=lambda value: str(value)[:40])
async def test_what_is_not_done_is_refused_by_name(
    path: str, changes: dict[str, Any], param: str, hosted: EngineProcess
) -> None:
    base = {CHAT: WHO, COMPLETION: TEXT, EMBEDDING: {}}[path]
    answer = await post(hosted, path, {**base, **changes})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and param in error["message"] and len(error["message"]) < 1000


async def test_every_field_may_be_null_and_harmless_ones_may_be_anything(hosted: EngineProcess) -> None:
    named = {name: None for name, field in fields.TABLE.items() if CHAT in field.paths and name != "messages"}
    assert said(await post(hosted, CHAT, {**named, **WHO})) == ADA_SAYS
    harmless: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "seed": 1, "n": 1, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False, "parallel_tool_calls": True,
        "stream_options": {"include_usage": True}, "top_k": -1, "logit_bias": {}, "stop": [],
        "max_tokens": fields.MAX_TOKENS, "no such field": None,
    }  # fmt: skip
    assert said(await chat(hosted, **harmless)) == ADA_SAYS


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 1e-300}, {"temperature": 1e-3}, {"top_p": 0, "temperature": 2}, {"top_k": 1, "temperature": 90},
     {"top_k": 1 << 40, "temperature": 1e-6}, {"min_p": 1.0, "temperature": 1}],
    ids=str,
)  # fmt: skip
async def test_sampling_at_its_edges_is_greedy(changes: dict[str, Any], hosted: EngineProcess) -> None:
    assert said(await chat(hosted, **changes)) == ADA_SAYS


async def test_biases_and_penalties_do_what_they_say(hosted: EngineProcess, residents: Residents) -> None:
    first = tokens_of(residents["ada"], ADA_SAYS)[0]
    pushed = said(await chat(hosted, logit_bias={str(first): -100.0, "99999999": 5}, max_tokens=3))
    assert pushed and not pushed.startswith("I")
    (wanted,) = tokens_of(residents["ada"], "!")
    assert said(await chat(hosted, logit_bias={str(wanted): 100}, max_tokens=3)) == "!!!"
    once = said(await chat(hosted, logit_bias={str(wanted): 4}, max_tokens=12))
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 100}):
        other = (await chat(hosted, logit_bias={str(wanted): 40}, max_tokens=30, **penalty)).json()
        assert other["usage"]["completion_tokens"] > 0 and other["choices"][0]["message"]["content"] != once
    free = (await chat(hosted, max_tokens=40, ignore_eos=True, return_token_ids=True)).json()["choices"][0]
    for penalty, most in (("frequency_penalty", 2.0), ("presence_penalty", 2.0), ("repetition_penalty", 50.0)):
        held = (await chat(hosted, max_tokens=40, ignore_eos=True, return_token_ids=True, **{penalty: most})).json()
        assert len(set(held["choices"][0]["token_ids"])) >= len(set(free["token_ids"])), penalty


async def test_ends_that_a_request_sets(hosted: EngineProcess, residents: Residents) -> None:
    tokens = tokens_of(residents["ada"], ADA_SAYS)
    answer = (await chat(hosted, stop_token_ids=[tokens[3]], return_token_ids=True)).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I am Ada", "stop")
    assert choice["token_ids"] == tokens[:4] and answer["usage"]["completion_tokens"] == 4
    assert len(choice["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    longer = (await chat(hosted, ignore_eos=True, max_tokens=len(tokens) + 6)).json()
    assert longer["usage"]["completion_tokens"] == len(tokens) + 6
    assert longer["choices"][0]["finish_reason"] == "length"
    assert (await chat(hosted, min_tokens=30, max_tokens=40)).json()["usage"]["completion_tokens"] >= 30
    late = (await chat(hosted, stop=["the"], min_tokens=200, max_tokens=10)).json()["choices"][0]
    assert late["finish_reason"] == "length"
    special = said(await chat(hosted, skip_special_tokens=False))
    assert special == ADA_SAYS, "the end is not in the text"


async def test_ids_as_input(hosted: EngineProcess, residents: Residents) -> None:
    ids = tokens_of(residents["ada"], "Who are you?")
    answers = [await post(hosted, COMPLETION, {**TEXT, "prompt": prompt}) for prompt in ("Who are you?", ids, [ids])]
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    vectors = [
        (await post(hosted, EMBEDDING, {"input": given})).json()["data"] for given in ("Who are you?", ids, [ids])
    ]
    assert all(found == vectors[0] for found in vectors)
    mixed = (await post(hosted, EMBEDDING, {"input": ["Hello", ids]})).json()["data"]
    assert mixed[1]["embedding"] == vectors[0][0]["embedding"]
    packed = await post(hosted, EMBEDDING, {"input": ids, "encoding_format": "base64"})
    raw = base64.b64decode(packed.json()["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == vectors[0][0]["embedding"]
    for same in ({"encoding_format": None}, {"dimensions": 256}, {"user": "me"}):
        assert (await post(hosted, EMBEDDING, {"input": ids, **same})).json()["data"] == vectors[0]


async def test_messages_as_clients_send_them_back(hosted: EngineProcess) -> None:
    history = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "me"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "annotations": [], "audio": None},
        {"role": "user", "content": "Who are you?"},
    ]
    assert (await chat(hosted, messages=history)).status_code == 200
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    for message, word in (
        (called, "does not support tool_calls"),
        ({"role": "user", "content": "x", "colour": "red"}, "colour"),
        ({"role": "user", "content": "x", "name": 3}, "name"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "not text"),
        ({"role": "user", "content": None}, "content"),
        ({"role": 3, "content": "x"}, "role"),
    ):
        answer = await chat(hosted, messages=[message])
        assert answer.status_code == 400 and word in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", CHAT, b"", 405),
        ("DELETE", "/v1/models", b"", 405),
        ("POST", "/", b"", 404),
        ("GET", "/v1/models/other", b"", 404),
        ("POST", CHAT, b"", 400),
        ("POST", CHAT, b"\xff\xfe{\x00}\x00", 400),
        ("POST", CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("POST", CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        ("POST", CHAT, b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", 400),
        ("POST", COMPLETION, b'{"prompt": "\\u0000\\ufffe", "max_tokens": 1}', 200),
        ("POST", "/" + "x" * 9000, b"", 404),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_every_error_is_openais(
    method: str, path: str, content: bytes, status: int, hosted: EngineProcess
) -> None:
    async with http(hosted) as client:
        answer = await client.request(method, path, content=content, headers={"content-type": "text/plain"})
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 1000


OWN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "stop_strings": ({"stop_strings": ["the folder"]}, {}, "I am Ada, the first model you dropped into "),
    "zero temperature": ({"do_sample": True, "temperature": 0.0}, {}, ADA_SAYS),
    "one of k": ({"do_sample": True, "temperature": 90.0, "top_k": 1}, {}, ADA_SAYS),
    "a request wins": ({"do_sample": True, "temperature": 90.0}, {"temperature": 0}, ADA_SAYS),
    "beams": ({"num_beams": 4, "early_stopping": True, "num_return_sequences": 2}, {}, ADA_SAYS),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, {}, ADA_SAYS),
    "assisted": ({"prompt_lookup_num_tokens": 3, "num_assistant_tokens": 4, "is_assistant": True}, {}, ADA_SAYS),
    "caches": ({"cache_implementation": "static", "use_cache": False, "max_length": 3, "max_time": 0.0}, {}, ADA_SAYS),
    "nonsense": ({"temperature": "hot", "top_p": -4, "top_k": [], "bad_words_ids": 3, "stop_strings": 7,
                  "suppress_tokens": "x", "eos_token_id": {"a": 1}, "no_repeat_ngram_size": 1e9}, {}, ADA_SAYS),
    "new tokens": ({"max_new_tokens": 3}, {}, "I am Ada"),
    "the tokenizer's end": ({"eos_token_id": 0}, {}, ADA_SAYS),
    "no end": ({}, {}, ADA_SAYS),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def rebound(factory: Any, residents: Residents) -> Any:
    """One engine for all variants of ada's side files."""
    engine = factory.create()
    await engine.start(residents["ada"].binding())

    async def bound(**changed: Path) -> EngineProcess:
        await engine.drain(1)
        side_files = {**residents["ada"].checkpoint.side_files()}
        side_files |= {name.replace("__", "."): path for name, path in changed.items()}
        await engine.rebind(residents["ada"].binding(side_files=side_files))
        return engine  # type: ignore[no-any-return]

    yield bound
    await engine.stop()


@pytest.mark.parametrize("what", OWN)
async def test_how_a_model_wants_to_be_asked(what: str, rebound: Any, tmp_path: Path) -> None:
    settings, asked, wanted = OWN[what]
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(settings))
    engine = await rebound(generation_config__json=file)
    body = {"messages": WHO["messages"], "max_tokens": 60} | asked
    if what == "new tokens":
        del body["max_tokens"]
    answer = await post(engine, CHAT, body)
    assert said(answer).startswith(wanted) and (said(answer) == wanted or what == "new tokens"), answer.text
    assert answer.json()["choices"][0]["finish_reason"] == ("length" if what == "new tokens" else "stop")


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
)
ASSIGNED = PARTS.replace("{% for c in m['content'] %}", "{% set parts = m.content %}{% for c in parts %}")
GUARDED = PARTS.replace(
    "{% for c in m['content'] %}", "{% if m.content is string %}never{% endif %}{% for c in m.content | list %}"
)


@pytest.mark.parametrize("template", [PARTS, ASSIGNED, GUARDED], ids=["parts", "assigned", "guarded"])
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
async def test_templates_that_loop_over_parts_get_parts(
    file: str, template: str, rebound: Any, residents: Residents, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
    changed: dict[str, Path] = {file.replace(".", "__"): path}
    if file.endswith("json"):  # used if there is no newer one
        own = residents["ada"].checkpoint.side_files()
        engine = await rebound()
        await engine.drain(1)
        side_files = {name: found for name, found in own.items() if name != "chat_template.jinja"} | {file: path}
        await engine.rebind(residents["ada"].binding(side_files=side_files))
    else:
        engine = await rebound(**changed)
    assert said(await chat(engine)) == ADA_SAYS
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}]
    assert said(await chat(engine, messages=parts)) == ADA_SAYS


async def test_templates_by_name(rebound: Any, residents: Residents, tmp_path: Path) -> None:
    plain = (residents["ada"].checkpoint.directory / "chat_template.jinja").read_text()
    engine = await rebound()
    own = {n: f for n, f in residents["ada"].checkpoint.side_files().items() if n != "chat_template.jinja"}
    for names, status in ((["tool_use", "rag"], 400), (["tool_use", "default"], 200), (["rag"], 200)):
        file = tmp_path / "chat_template.json"
        entries = [{"name": name, "template": plain} for name in names]
        file.write_text(json.dumps({"chat_template": entries}))
        await engine.drain(1)
        await engine.rebind(residents["ada"].binding(side_files={**own, file.name: file}))
        answer = await chat(engine)
        assert answer.status_code == status
        assert status == 200 or "tool_use" in answer.json()["error"]["message"]
    file.write_text(json.dumps({"chat_template": 3}))
    await engine.drain(1)
    with pytest.raises(EngineFailed, match=r"chat_template\.json"):
        await engine.rebind(residents["ada"].binding(side_files={**own, file.name: file}))
    await engine.resume()


async def test_a_token_that_has_no_row_is_refused_and_ends_nothing(
    rebound: Any, residents: Residents, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads((residents["ada"].checkpoint.directory / "tokenizer.json").read_text())
    size = json.loads((residents["ada"].checkpoint.directory / "config.json").read_text())["vocab_size"]
    tokenizer["added_tokens"].append({
        "id": size, "content": "<|think|>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    })  # fmt: skip
    file.write_text(json.dumps(tokenizer))
    engine = await rebound(tokenizer__json=file)
    question = [{"role": "user", "content": "<|think|> hm?"}]
    for stream in (False, True):
        answer = await chat(engine, messages=question, stream=stream)
        assert answer.status_code == 400 and str(size) in answer.json()["error"]["message"]
    assert (await post(engine, EMBEDDING, {"input": "<|think|>"})).status_code == 400
    assert said(await chat(engine)) == ADA_SAYS


@pytest.mark.parametrize("name", ["t5", "bart"])
async def test_encoder_decoders_are_counted_rightly(
    name: str, start: Start, made: Path, tmp_path: Path, residents: Residents
) -> None:
    engine = await start(Resident(made / name, tmp_path / "out").binding())
    whole = (await post(engine, COMPLETION, TEXT)).json()
    assert whole["usage"]["prompt_tokens"] == len(tokens_of(residents["ada"], "Who are you?"))
    assert 0 < whole["usage"]["completion_tokens"] <= 4
    streamed = await post(engine, COMPLETION, {**TEXT, "stream": True, "stream_options": {"include_usage": True}})
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n")[:-2]]
    assert events[-1]["usage"] == whole["usage"] and not any("error" in event for event in events)
    assert (await post(engine, EMBEDDING, {"input": "x"})).status_code == 400


OF_BOTH: dict[str, tuple[dict[str, Any], int]] = {
    "nothing said": ({}, 1),
    "greedy": ({"do_sample": False, "temperature": 2.0}, 1),
    "drawn": ({"do_sample": True, "temperature": 2.0}, 2),
    "drawn without a word": ({"temperature": 2.0}, 2),
    "one of k": ({"do_sample": True, "temperature": 2.0, "top_k": 1}, 1),
}


@pytest.mark.parametrize("what", ["drawn", "greedy", "nothing said"])
async def test_vllm_takes_the_same_defaults(what: str, vllm_factory: Any, residents: Residents, tmp_path: Path) -> None:
    settings, least = OF_BOTH[what]
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    own = {"generation_config.json": tmp_path / "generation_config.json"}
    engine = vllm_factory.create()
    await engine.start(residents["ada"].binding(side_files={**residents["ada"].checkpoint.side_files(), **own}))
    body = {"messages": WHO["messages"], "max_tokens": 40}
    answers = {said(await post(engine, CHAT, body)) for _ in range(8)}
    assert len(answers) >= least and (least > 1 or answers == {ADA_SAYS})
    if what == "nothing said":
        for method, path, content, status in (
            ("GET", CHAT, b"", 405),
            ("POST", "/nowhere", b"{}", 404),
            ("POST", CHAT, b"{", 400),
            ("POST", CHAT, b"{}", 400),
            ("POST", CHAT, b'{"messages": 3}', 400),
            ("POST", CHAT, json.dumps({**body, "model": "other"}).encode(), 404),
            ("POST", CHAT, json.dumps({**body, "temperature": -1}).encode(), 400),
            ("POST", CHAT, json.dumps({**body, "max_tokens": 10**6}).encode(), 400),
        ):
            async with http(engine) as client:
                answer = await client.request(
                    method, path, content=content, headers={"content-type": "application/json"}
                )
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, answer.text
            words = error["message"]
            assert words not in ("Not Found", "Method Not Allowed") and "validation error" not in words, words
            assert "swap" not in words and "'loc'" not in words
    await engine.stop()


@pytest.mark.parametrize("what", OF_BOTH)
async def test_defaults_are_the_models_own(what: str, rebound: Any, tmp_path: Path) -> None:
    settings, least = OF_BOTH[what]
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    engine = await rebound(generation_config__json=tmp_path / "generation_config.json")
    body = {"messages": WHO["messages"], "max_tokens": 40}
    answers = {said(await post(engine, CHAT, body)) for _ in range(8)}
    assert len(answers) >= least and (least > 1 or answers == {ADA_SAYS})


async def test_a_model_that_fails_says_so_whole_and_streamed(start: Start, made: Path, tmp_path: Path) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "model.norm.weight": torch.full_like(tensors["model.norm.weight"], float("nan"))}

    engine = await start(variant(made / "ada", tmp_path / "model", broken).binding())
    whole = await chat(engine, temperature=1)
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
    assert whole.json()["error"]["message"].startswith("the model could not answer: RuntimeError: ")
    streamed = openai.stream_chat(str(engine.socket_path), "", WHO["messages"], temperature=1)
    with pytest.raises(EngineFailed, match="the model could not answer"):
        await asyncio.to_thread(list, streamed)
