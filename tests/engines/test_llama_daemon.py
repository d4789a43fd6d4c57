# SPDX-License-Identifier: Apache-2.0
"""GGUF models of a running daemon, which llama.cpp's own llama-server answers for."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import built_llama
import gguf_files
import httpx
import made_models
import pytest
from manager import Manager, start
from running import CONFIG, Daemon
from waiting import PATIENCE_S, until

import flashd
from flashd import Client
from flashd.cli import llama_source
from flashd.client.results import Engine
from flashd.dbus.private_bus import PrivateBus
from flashd.engines.process_info import family
from flashd.errors import EngineFailed, Unsupported

pytestmark = pytest.mark.timeout(1800)  # llama.cpp may have to be built first
MATRICES = {"ann": gguf_files.F32, "ben": gguf_files.F16, "cat": gguf_files.Q8_0}
ASK = [{"role": "user", "content": "who are you?"}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    for seed, (name, matrices) in enumerate(MATRICES.items()):
        gguf_files.llama(seed, name=name, matrices=matrices).write(folder / f"{name}.gguf")
    gguf_files.llama(9, name="vectors", pooling=1, context=4096).write(folder / "vectors.gguf")
    gguf_files.llama(7, name="dora", context=40_000).write(folder / "dora.gguf")  # who does not come to an end
    gguf_files.llama(8, architecture="unheard-of").write(folder / "alien.gguf")
    return folder


@pytest.fixture(scope="module")
def answers(models: Path) -> dict[str, str]:
    """What the program itself answers, run by hand with the files."""
    found = {}
    for name in MATRICES:
        with (
            tempfile.TemporaryDirectory(prefix="fd-") as folder,
            built_llama.alone(models / f"{name}.gguf", Path(folder)) as client,
        ):
            answer = client.post("/v1/chat/completions", json={"messages": ASK, **GREEDY})
            found[name] = str(answer.json()["choices"][0]["message"]["content"])
    assert len(set(found.values())) == 3 and all(len(said) == 24 for said in found.values())
    return found


@pytest.fixture(scope="module")
def daemon(models: Path) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        running = Daemon(bus.address, Path(folder), Path(folder))
        running.config.write_text(f"{settings()}context = 30_000\n")
        running.start()
        try:
            with flashd.connect(bus.address) as client:
                for file in models.iterdir():
                    client.import_(file, file.stem)
            yield running
        finally:
            status, words = running.stop(), running.log.read_text()
    assert status == 0 and "Traceback" not in words, words


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """With no engine before and after a test."""
    with flashd.connect(daemon.address) as client:
        yield client
        for engine in client.engines():
            client.stop_engine(engine)


def settings() -> str:
    return f"{CONFIG}drain_timeout_s = 0.1\n[engines.llama]\nthreads = 1\nserver = '{built_llama.program()}'\n"


def said(client: Client, name: str) -> str:
    return client.chat(name, ASK, **GREEDY)


def servers(engine: Engine) -> Sequence[int]:
    """The llama-servers of an engine."""
    return [pid for pid in family(engine.pid)[1:] if b"llama-server" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def engine_of(client: Client, name: str) -> Engine:
    (found,) = [engine for engine in client.engines() if engine.model == name]
    return found


def test_models_answer_as_by_the_program_itself_whatever_was_swapped(client: Client, answers: dict[str, str]) -> None:
    hows = []
    for name in ("ann", "ben", "ann", "cat", "ben", "ann"):
        hows.append(client.swap(name).how)
        assert said(client, name) == answers[name]
    assert hows == ["start", "start", "wake", "start", "wake", "wake"]
    assert {engine.kind for engine in client.engines()} == {"llama.cpp"}


def test_the_program_maps_the_arena_and_opens_no_file_of_weights(client: Client, daemon: Daemon) -> None:
    client.swap("ann")
    (server,) = servers(engine_of(client, "ann"))
    mapped = Path(f"/proc/{server}/maps").read_text()
    assert "memfd:" in mapped and "r--s" in next(line for line in mapped.splitlines() if "memfd:" in line)
    opened = [str(file.readlink()) for file in Path(f"/proc/{server}/fd").iterdir()]
    assert not [path for path in opened if str(daemon.state / "store") in path]


def test_a_parked_engine_has_no_program_and_gets_one_when_it_wakes(client: Client, answers: dict[str, str]) -> None:
    client.swap("ann")
    before = engine_of(client, "ann")
    client.park()
    parked = engine_of(client, "ann")
    assert (parked.state, parked.pid, servers(parked)) == ("parked", before.pid, [])
    assert client.swap("ann").how == "wake"
    assert said(client, "ann") == answers["ann"]


def test_several_serve_at_once(client: Client, answers: dict[str, str]) -> None:
    client.swap("ann")
    client.serve("ben")
    assert {engine.model: engine.state for engine in client.engines()} == {"ann": "serving", "ben": "serving"}
    assert [said(client, name) for name in ("ben", "ann", "ben")] == [answers[name] for name in ("ben", "ann", "ben")]


def test_the_death_of_the_program_is_that_of_the_engine(client: Client, answers: dict[str, str]) -> None:
    client.swap("ann")
    os.kill(servers(engine_of(client, "ann"))[0], signal.SIGKILL)
    until(lambda: not client.engines())
    assert said(client, "ann") == answers["ann"]  # by another engine


def test_the_program_ends_with_its_engine(client: Client) -> None:
    client.swap("ann")
    engine = engine_of(client, "ann")
    (server,) = servers(engine)
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{server}").exists())


def test_an_architecture_that_the_program_does_not_know_is_named(client: Client, answers: dict[str, str]) -> None:
    client.swap("ann")
    with pytest.raises(EngineFailed, match="unknown model architecture: 'unheard-of'"):
        client.swap("alien")
    assert said(client, "ann") == answers["ann"]


def test_what_makes_the_program_abort_is_told(client: Client, answers: dict[str, str], tmp_path: Path) -> None:
    layers = gguf_files.llama(1)
    layers.entries["llama.block_count"] = gguf_files.Value(gguf_files.UINT32, 100_000)
    client.import_(layers.write(tmp_path / "layers.gguf"), "layers")
    client.swap("ann")
    with pytest.raises(EngineFailed, match=r"llama\.cpp: GGML_ASSERT\(.*n_layer.*\) failed"):
        client.swap("layers")
    assert said(client, "ann") == answers["ann"]


def test_an_argument_by_which_the_program_answers_elsewhere_is_named(client: Client, answers: dict[str, str]) -> None:
    client.swap("ann")
    client.set_config("models.ben.arguments", '["--api-prefix", "/elsewhere"]')
    with pytest.raises(EngineFailed, match="answers at another path") as refused:
        client.swap("ben")
    assert "--api-prefix" in refused.value.hint
    client.set_config("models.ben.arguments", "[]")
    assert said(client, "ann") == answers["ann"]
    assert said(client, "ben") == answers["ben"]


@pytest.mark.parametrize("kind", ["torch", "vllm"])
def test_other_engines_are_not_for_gguf(client: Client, kind: str) -> None:
    with pytest.raises(Unsupported, match=r"it is a GGUF file, with which only llama\.cpp answers"):
        client.swap("ann", engine=kind)


def test_other_models_are_not_for_llama_cpp(client: Client, tmp_path: Path) -> None:
    made_models.put(tmp_path, "ada")
    client.import_(tmp_path / "ada", "ada")
    with pytest.raises(Unsupported, match=r"llama\.cpp reads GGUF files only") as refused:
        client.swap("ada", engine="llama.cpp")
    assert "name no engine" in refused.value.hint


def test_models_embed_if_they_were_made_for_it(client: Client) -> None:
    until(lambda: client.model("vectors").capabilities == ("embedding",))
    assert client.model("ann").capabilities == ("completion",)
    client.swap("vectors")
    transport = httpx.HTTPTransport(uds=client.status().endpoint)
    with httpx.Client(transport=transport, base_url="http://flashd") as http:
        answer = http.post("/v1/embeddings", json={"model": "vectors", "input": ["one", "two"]}).json()
    assert answer["model"] == "vectors" and [len(each["embedding"]) for each in answer["data"]] == [64, 64]


def test_a_long_text_is_embedded_as_a_whole(client: Client) -> None:
    client.swap("vectors")
    with http(client) as asking:
        answer = asking.post("/v1/embeddings", json={"input": "a" * 2000})
        assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] > 2000, answer.text


def http(client: Client) -> httpx.Client:
    """For requests to the active model."""
    transport = httpx.HTTPTransport(uds=client.status().endpoint)
    return httpx.Client(transport=transport, base_url="http://flashd", timeout=PATIENCE_S)


def endless(client: httpx.Client) -> AbstractContextManager[httpx.Response]:
    ask = {"model": "dora", "messages": ASK, "stream": True, "max_tokens": 25_000, "temperature": 0}
    return client.stream("POST", "/v1/chat/completions", json=ask)


def test_a_stream_that_outlasts_a_swaps_patience_is_cut_in_words(client: Client, answers: dict[str, str]) -> None:
    client.swap("dora")
    with http(client) as asking, endless(asking) as stream:
        lines = stream.iter_lines()
        assert "chat.completion.chunk" in next(lines)
        client.swap("ann")
        *_, last, done = [line for line in lines if line]
    assert "the request was cut off by a swap" in last and done == "data: [DONE]"
    assert said(client, "ann") == answers["ann"]


def test_what_a_client_leaves_is_not_generated(client: Client, daemon: Daemon) -> None:
    client.swap("dora")
    engine = engine_of(client, "dora")
    log = daemon.state / "logs" / f"engine-{engine.path.rpartition('/')[2]}.log"
    with http(client) as asking, endless(asking) as stream:
        assert "chat.completion.chunk" in next(stream.iter_lines())
    until(lambda: engine_of(client, "dora").active_requests == 0)
    until(lambda: "stop processing" in log.read_text())
    (count,) = re.findall(r"stop processing: n_tokens = (\d+)", log.read_text())
    assert int(count) < 20_000


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/chat/completions", {"model": "ben", "messages": ASK}, 404, "'ben' is not served here: 'ann' is"),
        ("/v1/chat/completions", {"model": 1, "messages": ASK}, 400, "model must be a text"),
        ("/v1/chat/completions", {"messages": "x"}, 400, "messages"),
        ("/v1/chat/completions", [], 400, "not a JSON object"),
        ("/v1/embeddings", {"input": "x"}, 501, "does not support embeddings"),
        ("/tokenize", {}, 400, "it needs a prompt"),
        ("/slots/0?action=save", {"filename": "x"}, 404, "there is no POST /slots/0 here"),
        ("/lora-adapters", [], 404, "there is no POST /lora-adapters here"),
        ("/props", {}, 404, "there is no POST /props here"),
    ],
)
def test_bad_requests_are_refused_in_openais_form(client: Client, path: str, body: Any, status: int, said: str) -> None:
    client.swap("ann")
    with http(client) as asking:
        answer = asking.post(path, json=body)
        assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text


def test_what_is_no_json_is_refused(client: Client) -> None:
    client.swap("ann")
    with http(client) as asking:
        for raw in (b"", b"{", b"[" * 100_000):
            answer = asking.post("/v1/completions", content=raw)
            assert answer.status_code == 400 and "not valid JSON" in answer.json()["error"]["message"]


def test_tokens_are_counted_and_turned_back(client: Client) -> None:
    client.swap("ann")
    with http(client) as asking:
        text = asking.post("/tokenize", json={"prompt": "who"}).json()
        assert text == {"count": 4, "max_model_len": 512, "tokens": [1, *(3 + byte for byte in b"who")]}
        chat = asking.post("/tokenize", json={"messages": ASK}).json()
        assert chat["count"] == len(chat["tokens"]) > 20
        assert asking.post("/detokenize", json={"tokens": text["tokens"][1:]}).json() == {"prompt": "who"}


@pytest.fixture
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:
        made = Manager(Path(folder) / "manager")
        made.open()
        yield made
        made.close()


def test_engines_outlive_a_daemon_that_is_killed(manager: Manager, models: Path, answers: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        running = Daemon(bus.address, Path(folder), Path(folder))
        running.config.write_text(settings())
        start(running, manager)
        with flashd.connect(bus.address) as client:
            for name in ("ann", "ben"):
                client.import_(models / f"{name}.gguf", name)
                client.swap(name)
            before = {engine.model: (engine.pid, engine.state) for engine in client.engines()}
            (server,) = servers(engine_of(client, "ben"))
        running.stop(signal.SIGKILL)
        start(running, manager)
        with flashd.connect(bus.address) as client:
            until(lambda: len(client.engines()) == 2)
            assert {engine.model: (engine.pid, engine.state) for engine in client.engines()} == before
            assert servers(engine_of(client, "ben")) == [server]
            assert said(client, "ben") == answers["ben"]
            assert client.swap("ann").how == "wake"
            assert said(client, "ann") == answers["ann"]
        manager.empty()
        assert running.stop() == 0


@pytest.fixture
def bare() -> Iterator[Daemon]:
    """A daemon that is told of no llama-server, and finds none."""
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        running = Daemon(bus.address, Path(folder), Path(folder))
        running.config.write_text(f"{CONFIG}[engines.llama]\nthreads = 1\n")
        running.start()
        yield running
        assert running.stop() == 0


def test_one_command_brings_the_program_and_says_so_before(
    bare: Daemon, models: Path, answers: dict[str, str], tmp_path: Path
) -> None:
    with flashd.connect(bare.address) as client:
        client.import_(models / "ann.gguf", "ann")
        with pytest.raises(Unsupported) as refused:
            client.swap("ann")
        assert "flash engine install llama.cpp" in refused.value.hint
        wheel = llama_source.pack(built_llama.program(), tmp_path)
        result = client.begin_install("llama.cpp", [wheel]).wait()
        assert result == {"environment": 1, "version": llama_source.VERSION}
        assert said(client, "ann") == answers["ann"]
        (server,) = servers(engine_of(client, "ann"))
        program = Path(f"/proc/{server}/exe").readlink()
        assert program == bare.state / "environments" / "llama.cpp" / "1" / "bin" / "llama-server"


def test_an_engine_has_no_more_threads_than_there_are_cores(models: Path, answers: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        running = Daemon(bus.address, Path(folder), Path(folder))
        running.config.write_text(settings().replace("\nthreads = 1\n", "\nthreads = 100_000\n"))
        running.start()
        with flashd.connect(bus.address) as client:
            client.import_(models / "ann.gguf", "ann")
            client.swap("ann")
            (server,) = servers(engine_of(client, "ann"))
            command = Path(f"/proc/{server}/cmdline").read_text().split("\0")
            assert command[command.index("--threads") + 1] == str(len(os.sched_getaffinity(0)))
            assert said(client, "ann") == answers["ann"]
        assert running.stop() == 0


def test_a_program_that_does_not_run_here_is_not_installed(bare: Daemon, tmp_path: Path) -> None:
    (tmp_path / "llama-server").write_text("#!/bin/sh\necho made for another processor >&2; exit 1\n")
    wheel = llama_source.pack(tmp_path / "llama-server", tmp_path)
    with flashd.connect(bare.address) as client:
        with pytest.raises(EngineFailed, match="llama-server cannot be run here: made for another processor"):
            client.begin_install("llama.cpp", [wheel]).wait()
        assert client.environments() == []
