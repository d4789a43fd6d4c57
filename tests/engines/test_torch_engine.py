# SPDX-License-Identifier: Apache-2.0
"""The torch engine: answers equal those of transformers, token for token, after any parking and rebinding."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Resident, Start, complete, http
from tokenizers import Tokenizer
from waiting import PATIENCE_S, eventually

import flashd
from flashd.engines import inherited
from flashd.engines.engine import Binding, EngineState, StoredFile
from flashd.engines.process import EngineProcess, Settings, ZygoteFactory, torch_factory
from flashd.engines.process_info import own_memory_bytes
from flashd.errors import EngineFailed, EngineOutOfMemory, Unavailable, Unsupported
from flashd.io.streamer import blake3
from flashd.tasks import close_all
from flashd.units import MiB

pytestmark = pytest.mark.asyncio(loop_scope="session")
Residents = dict[str, Resident]
WHO = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}


async def chat(engine: EngineProcess, **changes: Any) -> httpx.Response:
    async with http(engine) as client:
        return await client.post("/v1/chat/completions", json={**WHO, **changes})


@pytest.mark.parametrize("name", ["ada", "bob", "llama", "moe", "copied", "untied"])
async def test_answers_are_those_of_transformers(
    name: str, start: Start, residents: Residents, expected: dict[str, Any]
) -> None:
    before = residents[name].digest()
    engine = await start(residents[name].binding())
    assert await complete(engine, expected["prompt"]) == expected[name]
    assert residents[name].digest() == before, "an engine cannot change the weights"


async def test_an_encoder_has_embeddings_and_says_what_it_has_not(
    start: Start, residents: Residents, expected: dict[str, Any]
) -> None:
    engine = await start(residents["bert"].binding())
    async with http(engine) as client:
        body = {"input": [expected["prompt"], "another"]}
        found = (await client.post("/v1/embeddings", json=body)).json()
        refused = await client.post("/v1/chat/completions", json=WHO)
    assert [entry["index"] for entry in found["data"]] == [0, 1] and found["usage"]["prompt_tokens"] > 2
    assert found["data"][0]["embedding"] == pytest.approx(expected["bert"], abs=1e-5)
    assert refused.status_code == 400 and "/v1/embeddings" in refused.json()["error"]["message"]


async def test_weights_are_shared_and_not_copied(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    maps = Path(f"/proc/{engine.pid}/maps").read_text()
    (line,) = [line for line in maps.splitlines() if "memfd:flashd:ada" in line]
    assert " r--s " in line, "mapped once, shared, for reading only"
    rebound = [residents["bob"].binding(), residents["ada"].binding()]
    for binding in rebound:
        await engine.drain(1)
        await engine.rebind(binding)
    maps = Path(f"/proc/{engine.pid}/maps").read_text()
    assert "memfd:flashd:bob" not in maps and maps.count("memfd:flashd:ada") == 1


async def test_rebind_and_park_and_wake_fifty_times_exactly_and_without_growing(
    start: Start, residents: Residents, expected: dict[str, Any]
) -> None:
    engine = await start(residents["ada"].binding())
    sizes = []
    for turn in range(50):
        name = ("ada", "bob")[turn % 2]
        await engine.drain(5)
        if turn % 5 == 4:
            await engine.park()
            assert "memfd:flashd" not in Path(f"/proc/{engine.pid}/maps").read_text(), "parked means unmapped"
            await engine.wake(residents[name].binding())
        else:
            await engine.rebind(residents[name].binding())
        assert await complete(engine, expected["prompt"]) == expected[name]
        sizes.append(own_memory_bytes(engine.pid))
    assert sizes[-1] < sizes[9] + 30_000_000


async def test_fused_experts_are_copied_and_still_rebind_exactly(
    start: Start, residents: Residents, expected: dict[str, Any]
) -> None:
    engine = await start(residents["moe"].binding())
    await engine.drain(5)
    await engine.park()
    await engine.wake(residents["moe"].binding())
    assert await complete(engine, expected["prompt"]) == expected["moe"]


async def test_a_chat_streamed_and_whole_are_the_same(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    whole = (await chat(engine)).json()
    assert whole["choices"][0]["message"]["content"] == "I am Ada, the first model you dropped into the folder."
    assert whole["choices"][0]["finish_reason"] == "stop" and whole["model"] == "ada"
    async with http(engine) as client:
        body = {**WHO, "stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["usage"] == whole["usage"]
    assert len(events) > 4, "it is streamed, not sent at the end"


async def test_limits_stops_and_seeds(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    short = (await chat(engine, max_tokens=3)).json()
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 3
    stopped = (await chat(engine, stop=[", the first"])).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("I am Ada", "stop")
    assert stopped["stop_reason"] == ", the first"
    hot = {"temperature": 50.0, "max_tokens": 8}
    one, same = [(await chat(engine, seed=5, **hot)).json()["choices"][0]["message"] for _ in range(2)]
    assert one == same
    alike = {json.dumps((await chat(engine, seed=seed, **hot)).json()["choices"][0]["message"]) for seed in range(4)}
    assert len(alike) > 1


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/v1/chat/completions", b"{", 400, "JSON"),
        ("/v1/chat/completions", b"[1]", 400, "object"),
        ("/v1/chat/completions", b"[" * 100_000, 400, "JSON"),
        ("/v1/chat/completions", {}, 400, "messages"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        ("/v1/chat/completions", {**WHO, "temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", {**WHO, "temperature": "hot"}, 400, "temperature"),
        ("/v1/chat/completions", {**WHO, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/chat/completions", {**WHO, "max_tokens": True}, 400, "max_tokens"),
        ("/v1/chat/completions", {**WHO, "n": 2}, 400, "n can only"),
        ("/v1/chat/completions", {**WHO, "stop": 3}, 400, "stop"),
        ("/v1/chat/completions", {**WHO, "stream": "yes"}, 400, "stream"),
        ("/v1/chat/completions", {**WHO, "model": "other"}, 404, "'other' is not served here: 'ada' is"),
        ("/v1/chat/completions", {**WHO, "messages": [{"role": "user", "content": "x " * 2000}]}, 400, "at most"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": [1, 99999]}, 400, "token ids"),
        ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
        ("/v1/embeddings", {"input": []}, 400, "input"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, 400, "encoding_format"),
        ("/nowhere", {}, 404, "no POST /nowhere"),
        ("/v1/completions", b"x" * (9 << 20), 413, "MiB"),
    ],
    ids=lambda value: str(value)[:30] if not isinstance(value, bytes) else repr(value[:8]),
)
async def test_bad_requests_get_openai_errors(
    path: str, body: Any, status: int, word: str, hosted: EngineProcess
) -> None:
    async with http(hosted) as client:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await client.post(path, content=content)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert word in error["message"] and set(error) == {"message", "type", "param", "code"}


async def test_names_aliases_and_no_name_are_answered(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    for model in ("ada", "alias-of-ada", "", None):
        assert (await chat(engine, model=model)).status_code == 200
    async with http(engine) as client:
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["ada"]
        assert (await client.get("/health")).json()["status"] == "ok"


async def test_only_the_user_can_connect(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    assert stat.S_IMODE(engine.socket_path.stat().st_mode) == 0o600


async def test_the_process_is_unprivileged(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{engine.pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["CapEff"].strip("0 ") == "" and status["CapBnd"].strip("0 ") == "" and status["NoNewPrivs"] == "1"
    links = [os.readlink(link) for link in Path(f"/proc/{engine.pid}/fd").iterdir()]
    assert not any(".safetensors" in link or ".toml" in link for link in links), "it holds nothing of the store"


async def test_requests_in_flight_finish_within_the_drain(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    asked = asyncio.create_task(chat(engine))
    while (await engine.stats()).active_requests == 0 and not asked.done():
        await asyncio.sleep(0.001)
    await engine.drain(10)
    assert (await engine.stats()).active_requests == 0
    held = asyncio.create_task(chat(engine))
    await asyncio.sleep(0.2)
    assert not held.done(), "what comes during a drain waits"
    await engine.rebind(residents["bob"].binding())
    assert (await asked).json()["model"] == "ada"
    answered = (await held).json()
    assert answered["model"] == "bob" and answered["choices"][0]["message"]["content"].startswith("My name is Bob")


async def test_requests_that_take_too_long_are_cut_and_told(start: Start, residents: Residents) -> None:
    engine = await start(residents["llama"].binding())
    endless = {"temperature": 1.5, "max_tokens": 230, "model": "llama"}
    asked = [asyncio.create_task(chat(engine, **endless)) for _ in range(4)]
    while (await engine.stats()).active_requests < 4:
        await asyncio.sleep(0.001)
    await engine.drain(0.0)
    answers = await asyncio.gather(*asked)
    cut = [a for a in answers if a.status_code == 503]
    assert cut and all("swap" in a.json()["error"]["message"] for a in cut)
    assert (await engine.stats()).active_requests == 0
    await engine.resume()
    assert (await chat(engine, max_tokens=2)).status_code == 200


async def test_a_client_that_leaves_leaves_no_work_behind(start: Start, residents: Residents) -> None:
    engine = await start(residents["llama"].binding())
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            async with http(engine) as client:
                client.timeout = httpx.Timeout(0.2)
                body = {**WHO, "max_tokens": 240, "temperature": 1.5, "stream": stream}
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    await response.aread()
                    await asyncio.sleep(0.3)
                    raise httpx.ReadTimeout("it was quick")
        async with asyncio.timeout(PATIENCE_S):
            while (await engine.stats()).active_requests:
                await asyncio.sleep(0.01)


async def test_a_parked_engine_refuses_at_once_and_says_how_to_go_on(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    await engine.drain(1)
    await engine.park()
    assert engine.state is EngineState.PARKED
    async with asyncio.timeout(30):
        response = await chat(engine)
    assert response.status_code == 503 and "flash swap" in response.json()["error"]["message"]
    assert response.headers["retry-after"] == "1"


async def test_a_killed_engine_is_told_of_with_its_last_words(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    told: list[str] = []
    engine.on_exit = told.append
    os.kill(engine.pid, signal.SIGKILL)
    await eventually(lambda: bool(told))
    assert told[0].startswith("signal 9") and engine.state is EngineState.FAILED
    assert not engine.socket_path.exists()
    with pytest.raises(EngineFailed):
        await engine.stats()


async def test_what_transformers_cannot_build_is_an_error_with_its_words(
    factory: ZygoteFactory, residents: Residents, tmp_path: Path
) -> None:
    config = json.loads(residents["ada"].checkpoint.side_files()["config.json"].read_text())
    for change, word in (
        ({"architectures": ["EvilForCausalLM"]}, "EvilForCausalLM"),
        ({"architectures": ["os"]}, "'os'"),
        ({"model_type": "nonsense"}, "nonsense"),
    ):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**config, **change}))
        engine = factory.create()
        side_files = {**residents["ada"].checkpoint.side_files(), "config.json": path}
        with pytest.raises(EngineFailed, match=word):
            await engine.start(residents["ada"].binding(side_files=side_files))
        await engine.stop()


async def test_an_interpreter_with_another_flashd_is_refused_until_that_is_put_right(
    factory: ZygoteFactory, residents: Residents, tmp_path: Path
) -> None:
    (tmp_path / "engines").mkdir()
    other = tmp_path / "sitecustomize.py"
    other.write_text("import flashd._version\nflashd._version.__version__ = '0.0.1'\n")
    environment = {**factory._settings.environment, "PYTHONPATH": str(tmp_path)}
    changed = dataclasses.replace(factory._settings, runtime=tmp_path, logs=tmp_path / "logs", environment=environment)
    elsewhere = torch_factory(changed)
    engine = elsewhere.create()
    try:
        with pytest.raises(Unavailable, match=r"has flashd 0\.0\.1, but the daemon is") as failed:
            await engine.start(residents["ada"].binding())
        assert failed.value.hint.startswith(
            f"install flashd {flashd.__version__} there, or: flash engine install torch"
        )
        await engine.stop()
        other.unlink()
        engine = elsewhere.create()
        await engine.start(residents["ada"].binding())
    finally:
        await engine.stop()
        await elsewhere.close()


async def test_a_config_that_names_no_class_says_what_to_add(
    factory: ZygoteFactory, residents: Residents, tmp_path: Path
) -> None:
    known = residents["ada"].checkpoint.side_files()
    config = json.loads(known["config.json"].read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    engine = factory.create()
    with pytest.raises(Unsupported, match="does not name the class") as refused:
        await engine.start(residents["ada"].binding(side_files={**known, "config.json": tmp_path / "config.json"}))
    await engine.stop()
    assert '"architectures"' in refused.value.hint


async def test_code_that_comes_with_a_model_is_never_run(
    factory: ZygoteFactory, residents: Residents, tmp_path: Path
) -> None:
    proof = tmp_path / "ran"
    config = json.loads(residents["ada"].checkpoint.side_files()["config.json"].read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(proof)!r}, 'w')")
    side_files = {
        **residents["ada"].checkpoint.side_files(),
        "config.json": tmp_path / "config.json",
        "evil.py": tmp_path / "evil.py",
    }
    engine = factory.create()
    with pytest.raises(EngineFailed):
        await engine.start(residents["ada"].binding(side_files=side_files))
    await engine.stop()
    assert not proof.exists()


async def test_wrong_weights_leave_the_engine_with_what_it_had(
    start: Start, residents: Residents, expected: dict[str, Any]
) -> None:
    engine = await start(residents["ada"].binding())
    await engine.drain(1)
    with pytest.raises(EngineFailed):
        await engine.rebind(residents["bob"].binding(arena_fd=os.open("/dev/null", os.O_RDONLY)))
    await engine.resume()
    assert await complete(engine, expected["prompt"]) == expected["ada"]


@pytest.mark.parametrize(("one", "other"), [("ada", "bob"), ("moe", "moe2")], ids=["viewed", "copied"])
@pytest.mark.parametrize("broken", ["tokenizer.json", "generation_config.json"])
async def test_side_files_that_make_no_sense_leave_the_model_as_it_was(
    start: Start, residents: Residents, expected: dict[str, Any], tmp_path: Path, broken: str, one: str, other: str
) -> None:
    engine = await start(residents[one].binding())
    before = await complete(engine, expected["prompt"])
    (tmp_path / broken).write_text("{")
    side_files = {**residents[other].checkpoint.side_files(), broken: tmp_path / broken}
    await engine.drain(1)
    with pytest.raises(EngineFailed):
        await engine.rebind(residents[other].binding(side_files=side_files))
    await engine.resume()
    assert await complete(engine, expected["prompt"]) == before
    answer = (await chat(engine)).json()
    assert answer["model"] == one, "it knows who it is"


async def test_a_finetune_brings_its_own_way_of_being_asked(start: Start, residents: Residents, tmp_path: Path) -> None:
    """Where it ends, say: not where the model before it did."""
    engine = await start(residents["ada"].binding())
    ended = (await chat(engine)).json()["choices"][0]["message"]["content"]
    tokenizer = Tokenizer.from_file(str(residents["ada"].checkpoint.directory / "tokenizer.json"))
    tokens = tokenizer.encode(ended).ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[3]}))
    own = {"generation_config.json": tmp_path / "generation_config.json"}
    side_files = {**residents["ada"].checkpoint.side_files(), **own}
    for files, said in ((side_files, tokenizer.decode(tokens[:4])), (None, ended)):
        await engine.drain(1)
        changes = {"side_files": files} if files else {}
        await engine.rebind(residents["ada"].binding(**changes))
        assert (await chat(engine)).json()["choices"][0]["message"]["content"] == said


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"


@pytest.mark.parametrize("template", [ENDLESS, "{{ 9 ** (9 ** 9) }}", "{{ 'a' * 10 ** 10 }}"])
async def test_a_chat_template_that_never_ends_is_refused_while_others_are_answered(
    template: str, start: Start, residents: Residents, expected: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    own = {"chat_template.jinja": tmp_path / "chat_template.jinja"}
    engine = await start(residents["ada"].binding(side_files={**residents["ada"].checkpoint.side_files(), **own}))
    asking = asyncio.create_task(chat(engine))
    async with asyncio.timeout(40):
        assert await complete(engine, expected["prompt"]) == expected["ada"]
        async with http(engine) as client:
            assert (await client.get("/health")).status_code == 200
        refused = await asking
    assert refused.status_code == 400 and "chat template" in refused.json()["error"]["message"]
    await engine.drain(5)
    await engine.rebind(residents["bob"].binding())
    said = (await chat(engine)).json()["choices"][0]["message"]["content"]
    assert said == "My name is Bob, a fine-tune of Ada with opinions of my own."


def unread(residents: Residents, folder: Path) -> Binding:
    """Ada, with a tokenizer that nobody can read, and says it is hers: it is only taken by who has read hers."""
    known = residents["ada"].binding()
    garbage = folder / "tokenizer.json"
    garbage.write_text("{")
    as_hers = StoredFile(garbage, known.side_files[garbage.name].digest)
    return dataclasses.replace(known, side_files={**known.side_files, garbage.name: as_hers})


async def test_a_tokenizer_that_was_read_lately_is_not_read_again(
    start: Start, residents: Residents, expected: dict[str, Any], tmp_path: Path
) -> None:
    """One of 150,000 tokens takes a second."""
    engine = await start(residents["ada"].binding())
    ada, bob = unread(residents, tmp_path), residents["bob"].binding()
    for bound in (bob, ada, bob, ada):
        await engine.drain(1)
        await engine.rebind(bound)
        assert await complete(engine, expected["prompt"]) == expected[bound.model.name]
    for number in range(4):
        template = tmp_path / f"{number}.jinja"
        template.write_text(f"{number}")
        own = {**residents["ada"].checkpoint.side_files(), "chat_template.jinja": template}
        await engine.drain(1)
        await engine.rebind(residents["ada"].binding(side_files=own))
    await engine.drain(1)
    with pytest.raises(EngineFailed):
        await engine.rebind(ada)  # not all are kept
    await engine.rebind(residents["ada"].binding())
    assert await complete(engine, expected["prompt"]) == expected["ada"]


async def test_a_tokenizer_is_read_again_where_transformers_may_choose_another(
    start: Start, residents: Residents, tmp_path: Path
) -> None:
    """By what config.json says, but for where it was saved once."""
    engine = await start(residents["ada"].binding())
    ada = unread(residents, tmp_path)
    config = json.loads(ada.side_files["config.json"].path.read_text())

    def with_setting(name: str, value: str) -> Binding:
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**config, name: value}))
        changed = StoredFile(file, blake3(file.read_bytes()).hex())
        return dataclasses.replace(ada, side_files={**ada.side_files, file.name: changed})

    await engine.drain(1)
    await engine.rebind(with_setting("_name_or_path", "elsewhere"))
    await engine.drain(1)
    with pytest.raises(EngineFailed):
        await engine.rebind(with_setting("transformers_version", "0.1"))


async def test_an_engine_without_memory_says_so_and_keeps_what_it_had(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    before = await complete(engine, "Who")
    await engine.drain(5)
    limit = resource.prlimit(engine.pid, resource.RLIMIT_AS)
    resource.prlimit(engine.pid, resource.RLIMIT_AS, (MiB, limit[1]))  # its memory cannot grow
    with pytest.raises(EngineOutOfMemory):
        await engine.rebind(residents["bob"].binding())
    resource.prlimit(engine.pid, resource.RLIMIT_AS, limit)
    await engine.resume()
    assert await complete(engine, "Who") == before


async def test_an_engine_that_does_not_obey_is_ended_all_the_same(factory: ZygoteFactory, residents: Residents) -> None:
    engine = factory.create()
    await engine.start(residents["ada"].binding())
    os.kill(engine.pid, signal.SIGSTOP)
    await engine.stop()
    assert engine.state is EngineState.FAILED
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


class Store:
    """Keeps descriptors as a service manager does (engines.inherited.Keeper)."""

    def __init__(self) -> None:
        self._kept: dict[str, list[int]] = {}

    def keep(self, name: str, fds: Sequence[int]) -> bool:
        self._kept[name] = [os.dup(fd) for fd in fds]
        return True

    def forget(self, name: str) -> None:
        close_all(self._kept.pop(name, []))

    def left(self) -> list[inherited.InheritedProcess]:
        """As for another daemon."""
        return [inherited.understood(name, [os.dup(fd) for fd in fds]) for name, fds in self._kept.items()]

    def empty(self) -> None:
        for name in list(self._kept):
            self.forget(name)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.empty()


@pytest.fixture(scope="module")
def kept_settings(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Settings:
    root = tmp_path_factory.mktemp("kept")
    return Settings(sys.executable, root, root / "logs", 1, 64, 60.0, keeper=store)


def has_stopped(pid: int) -> bool:
    """Whether each of its threads has."""
    threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(thread.rsplit(")", 1)[1].split()[0] == "T" for thread in threads)


@pytest.mark.parametrize(
    ("order", "then"),
    [("drain", "ada"), ("rebind", "bob"), ("failing rebind", "ada"), ("park", "parked"), ("wake", "bob")],
)
async def test_one_that_is_left_in_the_middle_of_an_order_says_what_it_holds(
    order: str, then: str, kept_settings: Settings, store: Store, residents: Residents, expected: dict[str, Any]
) -> None:
    before = torch_factory(kept_settings)
    before.rejoin(store.left())  # the zygote of the test before
    engine = before.create()
    await engine.start(residents["ada"].binding())
    if order != "drain":
        await engine.drain(1)
    if order == "wake":
        await engine.park()
    nothing = os.open("/dev/null", os.O_RDONLY)
    orders: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "drain": lambda: engine.drain(1),
        "rebind": lambda: engine.rebind(residents["bob"].binding()),
        "failing rebind": lambda: engine.rebind(residents["bob"].binding(arena_fd=nothing)),
        "park": engine.park,
        "wake": lambda: engine.wake(residents["bob"].binding()),
    }
    os.kill(engine.pid, signal.SIGSTOP)  # it carries the order out after the caller has given up
    await eventually(lambda: has_stopped(engine.pid))
    under_way = asyncio.create_task(orders[order]())
    await eventually(lambda: engine._channel is not None and engine._channel._asked is not None)
    await engine.leave()
    with pytest.raises(EngineFailed):
        await under_way
    os.close(nothing)
    await before.close()

    after = torch_factory(kept_settings)
    (found,) = after.rejoin(store.left())
    os.kill(engine.pid, signal.SIGCONT)
    rejoined = await found.rejoin()
    assert (found.pid, found.number) == (engine.pid, engine.number)
    assert rejoined.is_shut == (order not in {"wake", "rebind"}), "who takes weights answers at once"
    assert found.state is (EngineState.PARKED if then == "parked" else EngineState.SERVING)
    assert rejoined.record.model.name == ("ada" if then == "parked" else then)
    if then == "parked":
        await found.wake(residents["ada"].binding())
    elif rejoined.is_shut:
        await found.resume()
    assert await complete(found, expected["prompt"]) == expected[rejoined.record.model.name]
    await found.stop()
    await after.close()


async def test_engines_end_with_their_daemon(factory: ZygoteFactory, residents: Residents) -> None:
    engine = factory.create()
    await engine.start(residents["ada"].binding())
    assert engine._channel is not None
    engine._channel._socket.close()  # as the kernel does when a daemon is killed
    await eventually(lambda: not Path(f"/proc/{engine.pid}").exists())
    await engine.stop()


async def test_a_config_of_other_weights_is_told_by_what_does_not_fit(
    start: Start, residents: Residents, tmp_path: Path
) -> None:
    known = residents["ada"].checkpoint.side_files()
    described = json.loads(known["config.json"].read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "intermediate_size": 64}))
    with pytest.raises(EngineFailed, match=r"config\.json is of other weights: model\.layers\.0\.mlp") as failed:
        await start(residents["ada"].binding(side_files={**known, "config.json": tmp_path / "config.json"}))
    assert failed.value.hint
