# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine on a CPU.

Answers equal those of vLLM's own loader, token for token, after any parking and rebinding. Deaths are noticed and
explained, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from conftest import Resident, http, known_answers
from processes import is_alive, shared_memory
from vllm_greedy import PROMPTS
from vllm_python import VllmPython
from waiting import PATIENCE_S, eventually

from flashd.engines.engine import Binding, EngineOptions, EngineState
from flashd.engines.process import EngineProcess
from flashd.engines.process_info import own_memory_bytes
from flashd.engines.vllm_factory import VllmFactory
from flashd.errors import EngineFailed, EngineOutOfMemory, Unavailable, Unsupported

# Importing vLLM takes ten seconds on an idle machine, and plain vLLM answers first.
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]
Residents = dict[str, Resident]
Plain = dict[str, list[list[int]]]
Start = Callable[[Binding], Awaitable[EngineProcess]]
INTRODUCTION = "I am Ada, the first model you dropped into the folder."


@pytest_asyncio.fixture(loop_scope="session")
async def start(vllm_factory: VllmFactory) -> AsyncIterator[Start]:
    """Starts engines, and ends them with the test: nothing of theirs may be left."""
    engines: list[EngineProcess] = []
    shared = shared_memory()

    async def started(binding: Binding) -> EngineProcess:
        engine = vllm_factory.create()
        engines.append(engine)
        await engine.start(binding)
        return engine

    yield started
    for engine in engines:
        pids = family(engine.pid)
        await engine.stop()
        assert engine.state is EngineState.FAILED and not engine.socket_path.exists()
        await eventually(lambda pids=pids: not any(is_alive(pid) for pid in pids))
    await eventually(lambda: not shared_memory() - shared)


async def answers(engine: EngineProcess, prompts: list[str] = PROMPTS) -> list[list[int]]:
    return [await tokens(engine, prompt) for prompt in prompts]


async def tokens(engine: EngineProcess, prompt: str, **parameters: Any) -> list[int]:
    async with http(engine) as client:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 16, "return_token_ids": True, **parameters}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        found: list[int] = response.json()["choices"][0]["token_ids"]
        return found


async def chat(engine: EngineProcess, **changes: Any) -> httpx.Response:
    async with http(engine) as client:
        body = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, **changes}
        return await client.post("/v1/chat/completions", json=body)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for known in found:
        for children in Path(f"/proc/{known}").glob("task/*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found


def named(pid: int, word: str) -> int:
    """The process below this one whose title has the word."""
    (found,) = [pid for pid in family(pid) if word in Path(f"/proc/{pid}/cmdline").read_text()]
    return found


@pytest.mark.parametrize("name", ["ada", "llama", "moe"])
async def test_answers_are_those_of_plain_vllm(name: str, start: Start, residents: Residents, plain: Plain) -> None:
    before = residents[name].digest()
    engine = await start(residents[name].binding())
    assert await answers(engine) == plain[name]
    assert residents[name].digest() == before, "an engine cannot change the weights"
    assert stat.S_IMODE(engine.socket_path.stat().st_mode) == 0o600


async def test_rebind_and_park_and_wake_thirty_times_exactly_and_without_growing(
    start: Start, residents: Residents, plain: Plain
) -> None:
    engine = await start(residents["ada"].binding())
    sizes = []
    for turn in range(30):
        name = ("bob", "ada")[turn % 2]
        await engine.drain(5)
        if turn % 5 == 4:
            await engine.park()
            await engine.wake(residents[name].binding())
        else:
            await engine.rebind(residents[name].binding())
        # The long prompt's beginning is in the prefix cache, for the other model.
        assert await answers(engine) == plain[name]
        sizes.append(own_memory_bytes(engine.pid))
    assert sizes[-1] < sizes[9] + 30_000_000


@pytest.mark.parametrize(("one", "other"), [("llama", "llama"), ("moe", "moe2")])
async def test_other_architectures_come_back_exactly(
    one: str, other: str, start: Start, residents: Residents, plain: Plain
) -> None:
    engine = await start(residents[one].binding())
    await engine.drain(5)
    await engine.rebind(residents[other].binding())
    assert await answers(engine) == plain[other]
    await engine.drain(5)
    await engine.park()
    await engine.wake(residents[one].binding())
    assert await answers(engine) == plain[one]


async def test_an_output_layer_of_its_own_is_used_whatever_the_config_says(
    vllm_factory: VllmFactory, start: Start, residents: Residents, plain: Plain
) -> None:
    assert plain["copied"] == plain["ada"] != plain["untied"]
    copied, untied = (vllm_factory.rebind_key(residents[name].checkpoint) for name in ("copied", "untied"))
    assert copied != untied, "no engine that has one layer for both is given two"
    for name in ("copied", "untied"):
        assert await answers(await start(residents[name].binding())) == plain[name]


async def test_names_follow_the_binding(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    assert (await chat(engine)).json()["choices"][0]["message"]["content"] == INTRODUCTION
    assert (await chat(engine, model="alias-of-ada")).status_code == 200
    assert (await chat(engine, model="bob")).status_code == 404
    await engine.drain(1)
    await engine.rebind(residents["bob"].binding())
    answer = (await chat(engine, model="bob")).json()
    assert answer["model"] == "bob" and answer["choices"][0]["message"]["content"].startswith("My name is Bob")
    assert (await chat(engine, model="ada")).status_code == 404
    async with http(engine) as client:
        listed = (await client.get("/v1/models")).json()["data"]
    assert [entry["id"] for entry in listed] == ["bob", "alias-of-bob"]


async def test_a_chat_template_that_never_ends_is_refused(
    start: Start, residents: Residents, plain: Plain, tmp_path: Path
) -> None:
    known = residents["ada"].checkpoint.side_files()
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    sometimes = "{% if messages[0].content == 'loop' %}" + endless + "{% endif %}"
    template = tmp_path / "chat_template.jinja"
    template.write_text(sometimes + known[template.name].read_text())
    engine = await start(residents["ada"].binding(side_files={**known, template.name: template}))
    async with asyncio.timeout(100):
        refused = await chat(engine, messages=[{"role": "user", "content": "loop"}])
    assert refused.status_code == 400 and "chat template had not ended" in refused.json()["error"]["message"]
    assert (await chat(engine)).json()["choices"][0]["message"]["content"] == INTRODUCTION
    assert await answers(engine) == plain["ada"]


async def test_two_ranks_rebind_and_wake_exactly(
    vllm_factory: VllmFactory, residents: Residents, vllm: VllmPython, made: Path
) -> None:
    names = ("ada", "bob")
    jobs = [{"model": str(made / name), "load_format": "auto", "tensor_parallel_size": 2} for name in names]
    expected = dict(zip(names, known_answers(vllm, jobs), strict=True))
    settings = vllm_factory._settings
    told = {**settings.options, "arguments": [*settings.options["arguments"], "--tensor-parallel-size", "2"]}
    factory = VllmFactory(dataclasses.replace(settings, options=told), ())
    engine = factory.create()
    shared = shared_memory()
    try:
        await engine.start(residents["ada"].binding())
        assert await answers(engine) == expected["ada"]
        await engine.drain(5)
        await engine.rebind(residents["bob"].binding())
        assert await answers(engine) == expected["bob"]
        serving = own_memory_bytes(engine.pid)
        await engine.drain(5)
        await engine.park()
        assert own_memory_bytes(engine.pid) < serving - 50_000_000, "both ranks' weights and KV cache"
        await engine.wake(residents["ada"].binding())
        assert await answers(engine) == expected["ada"]
        for pid in family(engine.pid):
            os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not shared_memory() - shared)
    finally:
        await engine.stop()
        await factory.close()


async def test_a_parked_engine_refuses_at_once_and_has_given_memory_back(
    start: Start, residents: Residents, plain: Plain
) -> None:
    engine = await start(residents["ada"].binding())
    serving = own_memory_bytes(engine.pid)
    await engine.drain(1)
    await engine.park()
    assert engine.state is EngineState.PARKED
    assert own_memory_bytes(engine.pid) < serving - 50_000_000, "weights and KV cache"
    for pid in family(engine.pid):
        assert "memfd:flashd" not in Path(f"/proc/{pid}/maps").read_text()
        held = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
        assert not [target for target in held if "memfd:flashd" in target], "the arena is nobody's but the daemon's"
    async with asyncio.timeout(30):
        refused = await chat(engine)
    assert refused.status_code == 503 and "parked" in refused.json()["error"]["message"]
    async with http(engine) as client:
        assert (await client.get("/health")).status_code == 200
    with pytest.raises(Unsupported, match="on a GPU"):
        await engine.make_image(residents["bob"].binding())
    assert engine.state is EngineState.PARKED
    await engine.wake(residents["ada"].binding())
    assert await answers(engine) == plain["ada"]


async def test_requests_during_a_rebind_wait_and_are_the_new_models(
    start: Start, residents: Residents, plain: Plain
) -> None:
    engine = await start(residents["ada"].binding())
    await engine.drain(5)
    waiting = asyncio.create_task(tokens(engine, PROMPTS[0]))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await engine.rebind(residents["bob"].binding())
    assert await waiting == plain["bob"][0]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_does_not_finish_in_time_is_cut_and_told(
    stream: bool, start: Start, residents: Residents, plain: Plain
) -> None:
    engine = await start(residents["ada"].binding())
    long = {"max_tokens": 480, "ignore_eos": True, "stream": stream}
    cut = asyncio.create_task(chat(engine, **long))
    async with asyncio.timeout(PATIENCE_S):
        while (await engine.stats()).active_requests == 0:
            await asyncio.sleep(0.01)
    await engine.drain(0.05)
    answer = await cut
    assert "cut off by a swap" in answer.text and answer.status_code == (200 if stream else 503)
    await engine.rebind(residents["bob"].binding())
    assert await answers(engine) == plain["bob"]


async def test_many_at_once(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    found = await asyncio.gather(*[chat(engine) for _ in range(8)])
    assert {answer.json()["choices"][0]["message"]["content"] for answer in found} == {INTRODUCTION}
    assert (await engine.stats()).seen_requests == 8


async def test_processes_that_wait_for_each_other_use_little_of_the_cpu(start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    pids = family(engine.pid)
    await asyncio.sleep(1)  # vLLM looks for messages most often in the first second after one
    await tokens(engine, PROMPTS[0])
    before = sum(map(cpu_s, pids))
    await asyncio.sleep(0.8)
    assert sum(map(cpu_s, pids)) - before < 0.4


def cpu_s(pid: int) -> float:
    """The CPU time of a process so far, by proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("who", ["EngineCore", "Worker", ""])
async def test_a_death_is_noticed_and_takes_the_others_along(who: str, start: Start, residents: Residents) -> None:
    engine = await start(residents["ada"].binding())
    words: list[str] = []
    engine.on_exit = words.append
    pids = family(engine.pid)
    os.kill(named(engine.pid, who) if who else engine.pid, signal.SIGKILL)
    await eventually(lambda: bool(words))
    assert engine.state is EngineState.FAILED and not engine.socket_path.exists()
    await eventually(lambda: not any(is_alive(pid) for pid in pids))
    with pytest.raises(EngineFailed):
        await engine.stats()


@pytest.mark.parametrize("hangs", [False, True], ids=["all", "what-hangs-too"])
async def test_engines_end_with_their_daemon(vllm_factory: VllmFactory, residents: Residents, hangs: bool) -> None:
    shared = shared_memory()
    engine = vllm_factory.create()
    await engine.start(residents["ada"].binding())
    pids = family(engine.pid)
    assert len(pids) > 2 and engine._channel is not None
    for pid in pids[1:] if hangs else ():
        os.kill(pid, signal.SIGSTOP)  # executed programs, such as compilers, do not end with their parent
    engine._channel._socket.close()  # as the kernel does when a daemon is killed
    await eventually(lambda: not any(is_alive(pid) for pid in pids))
    # multiprocessing's tracker, which would remove it, may be among the stopped processes.
    await eventually(lambda: not shared_memory() - shared)
    await engine.stop()


async def test_a_start_that_is_given_up_leaves_nothing(vllm_factory: VllmFactory, residents: Residents) -> None:
    engine = vllm_factory.create()
    starting = asyncio.create_task(engine.start(residents["ada"].binding()))
    await eventually(lambda: engine.pid > 0 and len(family(engine.pid)) > 1, 60)
    pids = family(engine.pid)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await engine.stop()
    await eventually(lambda: not any(is_alive(pid) for pid in pids))
    scratch = engine.socket_path.parents[1] / "scratch"
    await eventually(lambda: not list(scratch.iterdir()))


async def test_a_start_that_hangs_is_ended_with_all_below_it(vllm_factory: VllmFactory, residents: Residents) -> None:
    """vLLM itself, told to end while it starts, may hang for minutes after its engine has died."""
    engine = vllm_factory.create()
    starting = asyncio.create_task(engine.start(residents["ada"].binding()))
    await eventually(lambda: engine.pid > 0 and len(family(engine.pid)) > 1, 60)
    pids = family(engine.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # the first of them only looks at something and ends
            os.kill(pid, signal.SIGSTOP)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await engine.stop()
    await eventually(lambda: not any(is_alive(pid) for pid in pids))
    scratch = engine.socket_path.parents[1] / "scratch"
    await eventually(lambda: not list(scratch.iterdir()))


_SAID = """\
(Worker pid=7) WARNING 11-27 09:24:38 [utils.py:597] Falling back. Exception: could not create a primitive
(EngineCore pid=6) ERROR 11-27 09:24:39 [core.py:1] Engine core initialization failed. RuntimeError: see above
(Worker pid=7) ERROR 11-27 09:24:39 [core.py:1] {}: no room
"""


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError", "flashd.errors.CorruptCheckpoint"])
async def test_the_cause_is_the_first_error_and_no_warning_nor_an_error_about_errors(
    error: str, vllm: VllmPython
) -> None:
    code = "import sys; from flashd.workers.vllm import worker; "
    code += "since = worker._log_bytes(); sys.stderr.write(sys.argv[1]); sys.stderr.flush(); "
    code += "print('CAUSE', worker._root_cause(since))"
    done = vllm.run(code, _SAID.format(error))
    assert done.stdout.splitlines()[-1] == f"CAUSE {error.rpartition('.')[2]}: no room"


_FORGETS = """
import asyncio, sys
from types import SimpleNamespace
from flashd.workers.vllm import worker

class Client:
    model_config = SimpleNamespace(is_multimodal_model=sys.argv[1] == "sees")
    output_processor = SimpleNamespace(request_states={"left over": None})
    calls = []
    async def abort(self, requests, internal):
        assert internal
        for request in requests:
            del self.output_processor.request_states[request]
    async def reset_prefix_cache(self):
        self.calls.append("prefix")
        return not self.output_processor.request_states and len(self.calls) > 1
    async def reset_encoder_cache(self):
        self.calls.append("encoder")

asyncio.run(worker.forget(Client(), is_clean=False))
print("CALLS", *Client.calls)
"""


@pytest.mark.parametrize(("model", "more"), [("sees", ["encoder"]), ("reads", [])])
async def test_what_other_weights_have_made_is_forgotten(model: str, more: list[str], vllm: VllmPython) -> None:
    """That vLLM is told so. What comes of it is tested on GPUs: vLLM for the processor has no models here that see."""
    done = vllm.run(_FORGETS, model)
    assert done.stdout.splitlines()[-1].split() == ["CALLS", "prefix", "prefix", *more]


async def test_more_than_there_is_memory_for_is_told_as_that(vllm_factory: VllmFactory, residents: Residents) -> None:
    """Refused late, after vLLM's processes have begun to share memory: nothing of that stays."""
    before = shared_memory()
    engine = vllm_factory.create(EngineOptions(kv_cache_bytes=1 << 50))
    starting = asyncio.create_task(engine.start(residents["ada"].binding()))
    await eventually(lambda: shared_memory() - before)
    os.kill(named(engine.pid, "resource_tracker"), signal.SIGSTOP)  # as if it were not scheduled on a busy machine
    with pytest.raises(EngineOutOfMemory):
        await starting
    await engine.stop()
    await eventually(lambda: not shared_memory() - before)


async def test_what_other_words_vllm_is_told_is_said_once(vllm_factory: VllmFactory, residents: Residents) -> None:
    engine = vllm_factory.create(EngineOptions(("--bogus",)))
    with pytest.raises(EngineFailed) as failed:
        await engine.start(residents["ada"].binding())
    assert failed.value.message.count("vLLM") == 1 and failed.value.message.endswith("--bogus")
    assert "engines.vllm.arguments" in failed.value.hint and "of the model" in failed.value.hint
    await engine.stop()


async def test_what_vllm_cannot_run_is_an_error_with_its_words(
    vllm_factory: VllmFactory, residents: Residents, tmp_path: Path
) -> None:
    known = residents["ada"].checkpoint.side_files()
    config = json.loads(known["config.json"].read_text())
    engine = vllm_factory.create()
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["EvilForCausalLM"]}))
    with pytest.raises(Unsupported, match="EvilForCausalLM"):
        await engine.start(residents["ada"].binding(side_files={**known, "config.json": tmp_path / "config.json"}))
    await engine.stop()


async def test_weights_that_do_not_fit_the_config_are_an_error_with_its_words(
    vllm_factory: VllmFactory, residents: Residents, tmp_path: Path
) -> None:
    known = residents["ada"].checkpoint.side_files()
    config = json.loads(known["config.json"].read_text())
    engine = vllm_factory.create()
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(EngineFailed) as failed:
        await engine.start(residents["ada"].binding(side_files={**known, "config.json": tmp_path / "config.json"}))
    assert "Engine core initialization failed" not in failed.value.message and "Error" in failed.value.message
    await engine.stop()


async def test_a_models_own_arguments_are_vllms_and_wrong_ones_are_told(
    vllm_factory: VllmFactory, residents: Residents
) -> None:
    for arguments, word in ((("--max-model-len", "100"), ""), (("--no-such-thing", "1"), "no-such-thing")):
        engine = vllm_factory.create(EngineOptions(arguments))
        if word:
            with pytest.raises(EngineFailed, match=word):
                await engine.start(residents["ada"].binding())
        else:
            await engine.start(residents["ada"].binding())
            refused = await chat(engine, max_tokens=200)
            assert refused.status_code == 400 and "100" in refused.text
        await engine.stop()


@pytest.mark.parametrize("draft", ["llama", ""])
async def test_a_draft_model_comes_from_its_folder_or_out_of_the_same_weights(
    draft: str, vllm_factory: VllmFactory, residents: Residents, made: Path, plain: Plain
) -> None:
    """With the other's weights, or none, it would not start: its tensors have other names and shapes, or no file."""
    path = str(made / draft) if draft else "./model"
    guessing = json.dumps({"method": "draft_model", "model": path, "num_speculative_tokens": 2})
    options = EngineOptions(("--speculative-config", guessing))
    engine = vllm_factory.create(options)
    await engine.start(residents["ada"].binding())
    assert await answers(engine) == plain["ada"]
    await engine.park()
    await engine.wake(residents["ada"].binding())
    assert await answers(engine) == plain["ada"]
    await engine.stop()


async def test_an_arena_that_is_none_leaves_the_engine_with_what_it_had(
    start: Start, residents: Residents, plain: Plain
) -> None:
    engine = await start(residents["ada"].binding())
    await engine.drain(1)
    with pytest.raises(EngineFailed):
        await engine.rebind(residents["bob"].binding(arena_fd=os.open("/dev/null", os.O_RDONLY)))
    with pytest.raises(EngineFailed):
        await engine.rebind(residents["bob"].binding(layout="{}"))
    await engine.resume()
    assert await answers(engine) == plain["ada"]


async def test_weights_of_another_shape_end_the_engine_rather_than_mix(start: Start, residents: Residents) -> None:
    """The key forbids it; should it happen all the same, nothing answers from half of two models."""
    engine = await start(residents["ada"].binding())
    pids = family(engine.pid)
    await engine.drain(1)
    with pytest.raises(EngineFailed):
        await engine.rebind(residents["llama"].binding())
    assert engine.state is EngineState.FAILED
    await eventually(lambda: not any(is_alive(pid) for pid in pids))


_KEY = """
import os, shutil, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from flashd.engines.messages import Tuning
from flashd.workers.vllm import compat, worker
source, *folders = sys.argv[1:]
for folder in folders:
    shutil.copytree(source, folder + "/model")
    os.chdir(folder)
    told = worker.vllm_arguments([folder], Tuning(threads=1, max_tokens_default=16, kv_cache_bytes=1 << 26), [])
    config = AsyncEngineArgs.from_cli_args(compat.parse(list(told))).create_engine_config()
    print("KEY", config.compute_hash())
"""


async def test_what_was_compiled_for_one_engine_counts_for_the_next(
    vllm: VllmPython, made: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "engine-one", tmp_path / "engine-two"]
    for folder in folders:
        folder.mkdir()
    done = vllm.run(_KEY, made / "ada", *folders)
    keys = [line for line in done.stdout.splitlines() if line.startswith("KEY ")]
    assert len(keys) == 2 and len(set(keys)) == 1, done.stderr[-3000:]


async def test_an_interpreter_without_vllm_is_unavailable_and_says_what_to_do(
    residents: Residents, tmp_path: Path, made: Path, vllm_factory: VllmFactory
) -> None:
    (tmp_path / "engines").mkdir()
    bare = shutil.which("python3", path="/usr/bin") or "/nonexistent/python"
    for python in (bare, "/nonexistent/python"):
        settings = dataclasses.replace(
            vllm_factory._settings, python=python, runtime=tmp_path, logs=tmp_path / "logs", environment={}
        )
        factory = VllmFactory(settings, ())
        engine = factory.create()
        with pytest.raises(Unavailable) as failed:
            await engine.start(residents["ada"].binding())
        assert "engines.vllm.python" in failed.value.hint
        await engine.stop()
        await factory.close()


async def test_the_key_of_a_rebind(vllm_factory: VllmFactory, residents: Residents, made: Path, tmp_path: Path) -> None:
    """Fine-tunes share it, however they were saved; whatever vLLM reads once, at its start, parts them."""
    ada = vllm_factory.rebind_key(residents["ada"].checkpoint)
    assert ada == vllm_factory.rebind_key(residents["bob"].checkpoint) != ""
    assert ada != vllm_factory.rebind_key(residents["llama"].checkpoint)

    def changed(name: str, change: Callable[[str], str]) -> str:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(made / "ada", folder)
        file = folder / name
        file.write_text(change(file.read_text()))
        return vllm_factory.rebind_key(Resident(folder, folder.with_name(folder.name + ".out")).checkpoint)

    def with_setting(key: str, value: Any) -> Callable[[str], str]:
        return lambda text: json.dumps({**json.loads(text), key: value})

    assert changed("config.json", with_setting("transformers_version", "0.1")) == ada
    assert changed("config.json", with_setting("_name_or_path", "/elsewhere")) == ada
    assert changed("tokenizer_config.json", with_setting("is_local", True)) == ada
    assert changed("config.json", with_setting("dtype", "float32")) != ada
    assert changed("config.json", with_setting("rms_norm_eps", 0.5)) != ada
    assert changed("generation_config.json", with_setting("temperature", 0.1)) != ada
    assert changed("tokenizer_config.json", with_setting("model_max_length", 5)) != ada
    assert changed("chat_template.jinja", lambda text: text + "Be brief.") != ada
    assert changed("tokenizer.json", lambda text: text + "\n") != ada
