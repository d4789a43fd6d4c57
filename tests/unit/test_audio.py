# SPDX-License-Identifier: Apache-2.0
"""Recordings: forms are read as engines read them, and passed on byte for byte.

The engine is a stand-in that reads forms with Starlette, as vLLM does; tests/engines/test_recordings.py has a real one.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from gateway_alone import Hears, gateway, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from flashd.errors import InvalidArgument
from flashd.gateway.forms import parse_form

TYPE = "multipart/form-data; boundary=XX"
WAV = b"RIFF\r\n--XY\r\n\0\xff" * 9


def part(head: str, content: bytes) -> bytes:
    return f"--XX\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--XX--\r\n"


FILE = part('name="file"; filename="a.wav"', WAV)
MODEL = part('name="model"', b"ada")


async def by_starlette(content_type: str, body: bytes) -> list[tuple[str, object]]:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    scope = {"type": "http", "headers": [(b"content-type", content_type.encode())]}
    async with Request(scope, receive).form() as found:
        return [(name, value if isinstance(value, str) else await value.read()) for name, value in found.multi_items()]


# -- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(FILE, MODEL), (MODEL, FILE), (FILE,), (part('name="other"', b"ada"), MODEL, FILE)])
async def test_only_the_name_of_the_model_changes(parts: tuple[bytes, ...]) -> None:
    body = form(*parts)
    found = parse_form(TYPE, body, {"model"})
    assert found.value("model") == ("ada" if MODEL in parts else "")
    named = found.with_value("model", "the/longer name")
    wanted = [(name, "the/longer name" if name == "model" else value) for name, value in await by_starlette(TYPE, body)]
    if MODEL not in parts:
        wanted.insert(0, ("model", "the/longer name"))
    assert await by_starlette(TYPE, named) == wanted
    assert MODEL not in parts or found.with_value("model", "ada") is body


_NAMES = st.sampled_from(["model", "file", "stream", "prompt"])
_TEXTS = st.text(st.characters(codec="utf-8"), max_size=30).map(str.encode)
_CONTENTS = st.one_of(_TEXTS, st.sampled_from([b"\r", b"\r\n--X", b"\n--XX", WAV, b"a" * 70_000, b"\r\n" * 140_000]))


@settings(deadline=None)
@given(st.lists(st.tuples(_NAMES, st.booleans(), _CONTENTS), max_size=5))
def test_a_form_says_the_same_here_as_in_an_engine(parts: list[tuple[str, bool, bytes]]) -> None:
    body = form(*(part(f'name="{name}"' + '; filename="f"' * is_file, content) for name, is_file, content in parts))
    models = [content for name, _, content in parts if name == "model"]
    try:
        found = parse_form(TYPE, body, {"model"})
    except InvalidArgument:
        is_text = not any(is_file for name, is_file, _ in parts if name == "model")
        assert (
            len(models) > 1
            or not is_text
            or len(models[0]) > 4096
            or b"\xff" in models[0]
            or models[0].startswith(b"\r")
        )
        return
    said = dict(asyncio.run(by_starlette(TYPE, body)))
    assert found.value("model") == said.get("model", "")
    if models != [b""]:
        assert dict(asyncio.run(by_starlette(TYPE, found.with_value("model", "bob")))) == {**said, "model": "bob"}


def test_a_value_is_found_wherever_the_pieces_end() -> None:
    for padding in range((256 << 10) - 130, (256 << 10) + 10):
        body = form(part('name="file"; filename="a"', b"a" * padding), MODEL)
        found = parse_form(TYPE, body, {"model"})
        assert body[found.fields["model"].begin : found.fields["model"].end] == b"ada"


@pytest.mark.parametrize(
    ("content_type", "body", "words"),
    [
        ("application/json", form(MODEL), "not a form"),
        ("multipart/form-data", form(MODEL), "not a form"),
        (TYPE, b"", "no end"),
        (TYPE + "X" * 300, form(MODEL), "Boundary length"),
        (TYPE, b"nonsense", "not a form"),
        (TYPE, MODEL + FILE, "no end"),
        (TYPE, form(MODEL)[:-8], "no end"),
        (TYPE, form(MODEL, MODEL), "two fields"),
        (TYPE, form(part('name="model"; filename="a"', b"ada")), "a file"),
        (TYPE, form(part('name="model"', b"a" * 5000)), "longer"),
        (TYPE, form(part('name="model"', b"\xff\xfe")), "utf-8"),
        (TYPE, form(*[FILE] * 1001), "1000 parts"),
        (TYPE, form(part('name="' + "a" * 9000 + '"', b"a")), "form|KiB of headers"),
        (TYPE + "; charset=utf-16", form(MODEL), "charset"),
    ],
)
def test_what_is_no_form_is_refused(content_type: str, body: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse_form(content_type, body, {"model"})


def test_an_empty_name_cannot_be_replaced() -> None:
    found = parse_form(TYPE, form(part('name="model"', b""), FILE), {"model"})
    with pytest.raises(InvalidArgument, match="empty"):
        found.with_value("model", "ada")


# -- through the gateway ---------------------------------------------------------------------------------------------


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:
        yield Path(folder)


async def test_a_recording_is_passed_on_as_it_came(short_path: Path) -> None:
    engine = Hears()
    async with serving(engine, short_path / "e.sock"), gateway(short_path / "e.sock") as client:
        headers = {"content-type": TYPE, "authorization": "Bearer secret"}
        bodies = [form(part('name="model"', b"whisper"), FILE), form(FILE, part('name="model"', b"whisper"))]
        for body in bodies:
            answer = await client.post("/v1/audio/transcriptions", content=body, headers=headers)
            assert answer.json()["text"] == f"{len(WAV)} bytes"
        assert engine.bodies == bodies
        assert all("authorization" not in each and each["content-type"] == TYPE for each in engine.headers)
        metrics = (await client.get("/metrics")).text
        assert 'flashd_tokens_total{kind="prompt",model="whisper"} 10.0' in metrics
        endpoint = 'endpoint="/v1/audio/transcriptions"'
        assert f'flashd_requests_total{{{endpoint},model="whisper",status="200"}} 2.0' in metrics


async def test_openais_client_is_answered(short_path: Path) -> None:
    engine, recording = Hears(), ("a.wav", b"\r\n--" * 700_000)
    async with serving(engine, short_path / "e.sock"), gateway(short_path / "e.sock") as web:
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=web, max_retries=0)
        for name in ("whisper", "ears", "whisper:latest"):
            said = await client.audio.transcriptions.create(model=name, file=recording)
            assert said.text == "2800000 bytes"
        answer = await web.post("/v1/audio/translations", files={"file": recording}, data={"model": "ears"})
        assert answer.json()["text"] == "2800000 bytes"
        answer = await web.post("/v1/audio/transcriptions", files={"file": recording}, data={"stream": "true"})
        assert answer.headers["content-type"].startswith("text/event-stream") and answer.text.endswith("[DONE]\n\n")
        with pytest.raises(openai.NotFoundError, match="did you mean whisper"):
            await client.audio.transcriptions.create(model="wisper", file=recording)
        with pytest.raises(openai.BadRequestError, match="not a form"):
            await client.post("/audio/transcriptions", body={"model": "whisper"}, cast_to=object)


async def test_an_engine_without_ears_is_not_asked(short_path: Path) -> None:
    engine = Hears()
    async with serving(engine, short_path / "e.sock"), gateway(short_path / "e.sock", kind="torch") as web:
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=web, max_retries=0)
        with pytest.raises(openai.APIStatusError, match="in a torch engine") as refused:
            await client.audio.transcriptions.create(model="whisper", file=("a.wav", WAV))
    assert refused.value.status_code == 501 and not engine.bodies
