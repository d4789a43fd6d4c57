# SPDX-License-Identifier: Apache-2.0
"""Swaps over the bus with real engines: requests, rebinds, parking and waking, failures, and recovery."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SAYS, Daemon, Remote, import_model, make_source
from waiting import eventually

from flashd.dbus import wire
from flashd.errors import Busy, FlashdError, NotFound, Unavailable, Unsupported


@pytest.fixture
async def three(remote: Remote, sources: Path) -> Remote:
    for name in ("ada", "bob", "carl"):
        await import_model(remote, sources / name, name)
    return remote


async def swap(remote: Remote, name: str) -> dict[str, Any]:
    (job,) = await remote.call("Swap", "sa{sv}", name, {})
    return await remote.finished(job)


async def how(remote: Remote, name: str) -> str:
    job = await swap(remote, name)
    assert job["State"] == "done", job["Error"]
    return str(job["Result"]["how"])


async def ask(remote: Remote, model: str = "") -> str:
    endpoint = await remote.get(wire.ROOT_PATH, wire.MANAGER, "Endpoint")
    body = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 40}
    transport = httpx.AsyncHTTPTransport(uds=endpoint)
    async with httpx.AsyncClient(transport=transport, base_url="http://flashd", timeout=60) as client:
        answer = await client.post("/v1/chat/completions", json=body | ({"model": model} if model else {}))
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])


async def active(remote: Remote) -> str:
    return str(await remote.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel"))


async def engines(remote: Remote) -> dict[str, dict[str, Any]]:
    return {path: o[wire.ENGINE] for path, o in (await remote.objects()).items() if wire.ENGINE in o}


async def test_swap_ask_rebind_park_and_wake(three: Remote) -> None:
    assert await how(three, "ada") == "start"
    assert await ask(three) == SAYS["ada"]
    assert await how(three, "bob") == "rebind"
    assert await ask(three, "bob") == SAYS["bob"]
    assert await active(three) == wire.model_path("bob")
    assert await how(three, "bob") == "already-active"
    models = {name: await three.model(name) for name in ("ada", "bob")}
    assert (models["ada"]["Active"], models["bob"]["Active"]) == (False, True)
    assert (models["ada"]["Leases"], models["bob"]["Leases"]) == (0, 1)
    assert models["ada"]["Residency"] == models["bob"]["Residency"] == "host"
    with pytest.raises(Busy):
        await three.call("Remove", path=wire.model_path("bob"), interface=wire.MODEL)
    (job,) = await three.call("Park")
    assert (await three.finished(job))["State"] == "done"
    assert await active(three) == "/"
    assert [engine["State"] for engine in (await engines(three)).values()] == ["parked"]
    assert await how(three, "ada") == "wake"
    assert await ask(three) == SAYS["ada"]
    assert (await three.model("ada"))["UseCount"] == 2
    (job,) = await three.call("Park")
    await three.finished(job)
    (job,) = await three.call("Park")
    assert (await three.finished(job))["Error"][0] == NotFound.bus_name()


async def test_another_architecture_has_its_own_engine_and_the_first_stays_parked(lasting: Remote) -> None:
    assert await how(lasting, "ada") == "start"
    (first,) = await engines(lasting)
    assert await how(lasting, "carl") == "start"
    assert sorted(engine["State"] for engine in (await engines(lasting)).values()) == ["parked", "serving"]
    assert await how(lasting, "bob") == "wake"
    assert await lasting.get(wire.ROOT_PATH, wire.MANAGER, "ActiveEngine") == first
    assert await ask(lasting) == SAYS["bob"]
    await lasting.call("Stop", path=first, interface=wire.ENGINE)
    assert first not in await engines(lasting)
    assert await active(lasting) == "/"


async def test_a_swap_that_fails_leaves_the_previous_model_answering(
    three: Remote, daemon: Daemon, tmp_path: Path
) -> None:
    await import_model(three, make_source(tmp_path / "strange"), "strange")
    assert await how(three, "ada") == "start"
    failed = await swap(three, "strange")
    assert failed["Error"][0] == Unsupported.bus_name()
    assert "tiny" in failed["Error"][1].lower()
    bob = daemon.state / "store" / "checkpoints" / (await three.model("bob"))["Checkpoint"] / "model.safetensors"
    with bob.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    failed = await swap(three, "bob")
    assert failed["Error"][0] == "org.flashd1.Error.CorruptCheckpoint"
    assert await active(three) == wire.model_path("ada")
    assert await ask(three) == SAYS["ada"]


async def test_swaps_asked_at_once_are_done_in_order_and_the_same_is_one_job(three: Remote) -> None:
    asked = ["ada", "ada", "bob", "bob", "ada", "carl", "ada"]
    replies = await asyncio.gather(*(three.call("Swap", "sa{sv}", name, {}) for name in asked))
    paths = [path for (path,) in replies]
    assert len(set(paths)) == 5
    assert (paths[0], paths[2]) == (paths[1], paths[3])
    ended = [await three.finished(path) for path in dict.fromkeys(paths)]
    assert [job["State"] for job in ended] == ["done"] * 5
    assert [job["FinishedAt"] for job in ended] == sorted(job["FinishedAt"] for job in ended)
    assert await ask(three) == SAYS["ada"]


async def test_cancelling_swaps_at_any_moment_leaves_somebody_answering(three: Remote) -> None:
    assert await how(three, "ada") == "start"
    for delay_s in (0.0, 0.002, 0.005, 0.01, 0.03):
        (job,) = await three.call("Swap", "sa{sv}", "carl", {})
        await asyncio.sleep(delay_s)
        await three.call("Cancel", path=job, interface=wire.JOB)
        ended = await three.finished(job)
        assert ended["State"] in {"cancelled", "done"}
        wanted = "carl" if ended["State"] == "done" else "ada"
        assert await active(three) == wire.model_path(wanted)
        await ask(three)
        await how(three, "ada")
        assert await ask(three) == SAYS["ada"]


async def test_an_engine_that_dies_is_replaced_once(three: Remote, daemon: Daemon) -> None:
    assert await how(three, "ada") == "start"
    ((path, engine),) = (await engines(three)).items()
    os.kill(engine["Pid"], signal.SIGKILL)

    async def answers_again() -> bool:
        there = await engines(three)
        return path not in there and [e["State"] for e in there.values()] == ["serving"]

    await eventually(answers_again)
    assert await ask(three) == SAYS["ada"]
    ((_, engine),) = (await engines(three)).items()
    os.kill(engine["Pid"], signal.SIGKILL)

    async def none_left() -> bool:
        return await engines(three) == {}

    await eventually(none_left)
    await asyncio.sleep(0.5)
    assert await active(three) == "/"
    assert await engines(three) == {}
    assert await how(three, "ada") == "start", "who asks gets a new one all the same"
    assert "ended unexpectedly" in daemon.log.read_text()


async def test_a_swap_away_from_an_engine_that_is_stuck_succeeds_and_ends_it(three: Remote, daemon: Daemon) -> None:
    """One that could have taken the new model in place, and one that could not."""
    daemon.stop()
    with daemon.config.open("a") as file:
        file.write("drain_timeout_s = 0.5\n")
    daemon.start()
    assert await how(three, "ada") == "start"
    for name in ("bob", "carl"):
        ((path, engine),) = (await engines(three)).items()
        os.kill(engine["Pid"], signal.SIGSTOP)
        assert await how(three, name) == "start"
        assert path not in await engines(three)
        assert await active(three) == wire.model_path(name)
        assert name == "carl" or await ask(three, name) == SAYS[name]


async def is_parked(remote: Remote) -> bool:
    return [engine["State"] for engine in (await engines(remote)).values()] == ["parked"]


async def test_a_model_may_have_an_idle_time_of_its_own_while_it_serves(three: Remote, daemon: Daemon) -> None:
    async def rests() -> bool:
        return bool(await three.get(wire.ROOT_PATH, wire.MANAGER, "RestingModel") == wire.model_path("ada"))

    await how(three, "ada")
    with pytest.raises(Unavailable, match="carl does not serve"):
        await three.call("SetIdleTimeout", "u", 0, path=wire.model_path("carl"), interface=wire.MODEL)
    await three.call("SetIdleTimeout", "u", 0, path=wire.model_path("ada"), interface=wire.MODEL)
    await eventually(rests)
    await how(three, "ada")
    await three.call("SetConfig", "ss", "engines.idle_timeout_s", "1")
    await three.call("SetIdleTimeout", "u", wire.NEVER, path=wire.model_path("ada"), interface=wire.MODEL)
    await asyncio.sleep(5)  # longer than it takes to notice an idle model
    assert not await rests()
    await three.call("SetConfig", "ss", "engines.idle_timeout_s", "0")


async def test_an_idle_model_is_parked_and_who_asks_wakes_it(three: Remote, daemon: Daemon) -> None:
    await three.call("SetConfig", "ss", "engines.idle_timeout_s", "1")
    assert await how(three, "ada") == "start"
    await eventually(lambda: is_parked(three))
    assert await active(three) == "/"
    assert await three.get(wire.ROOT_PATH, wire.MANAGER, "RestingModel") == wire.model_path("ada")
    flash = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).with_name("flash"), "--bus", daemon.address, "status"), stdout=asyncio.subprocess.PIPE
    )
    assert b"ada rests: the next request wakes it" in (await flash.communicate())[0]
    assert (await three.model("ada"))["Residency"] == "host"
    endpoint = await three.get(wire.ROOT_PATH, wire.MANAGER, "Endpoint")
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=endpoint), base_url="http://flashd") as client:
        for path in ("/health", "/v1/models"):
            looked = await client.get(path)
            assert (looked.status_code, looked.json()["error"]["code"]) == (503, "not_serving")
            assert "a POST request wakes it" in looked.json()["error"]["message"]
    assert await active(three) == "/", "looking wakes nobody"
    await three.call("SetConfig", "ss", "engines.idle_timeout_s", "0")
    assert await asyncio.gather(*(ask(three) for _ in range(3))) == [SAYS["ada"]] * 3
    assert await active(three) == wire.model_path("ada")
    assert await three.get(wire.ROOT_PATH, wire.MANAGER, "RestingModel") == "/"
    assert len(await engines(three)) == 1


class KeepAliveConnection(http.client.HTTPConnection):
    """One connection to a socket, made again only if the other side has said that it ends."""

    def __init__(self, path: str) -> None:
        super().__init__("flashd", timeout=60)
        self._path = path
        self.made = 0

    def connect(self) -> None:
        self.made += 1
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        answer = self.getresponse()
        return answer.status, json.loads(answer.read())

    def asks(self, **more: Any) -> str:
        """Which model answers a question."""
        status, answer = self.ask("/v1/completions", {"prompt": "Who", "max_tokens": 4, **more})
        return answer["model"] if status == 200 else f"{status}: {answer}"


@pytest.fixture
async def kept(three: Remote) -> AsyncIterator[KeepAliveConnection]:
    made = KeepAliveConnection(await three.get(wire.ROOT_PATH, wire.MANAGER, "Endpoint"))
    yield made
    made.close()


async def test_a_connection_that_is_kept_gets_the_answers_of_the_model_that_is_active_then(
    three: Remote, kept: KeepAliveConnection
) -> None:
    """After a swap to another engine, of other weights in the same, and back; whatever it asks, and however long."""
    endpoint = await three.get(wire.ROOT_PATH, wire.MANAGER, "Endpoint")
    for number, name in enumerate(("ada", "bob", "carl", "ada", "carl", "bob")):
        await how(three, name)
        if number == 0:
            raw = socket.socket(socket.AF_UNIX)
            raw.connect(endpoint)
            client = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=endpoint), base_url="http://flashd")
        for _ in range(2):
            assert await asyncio.to_thread(kept.asks) == name
            assert await asyncio.to_thread(kept.asks, model=name, prompt="x " * 50_000, max_tokens=1) != ""
            asked = await client.post("/v1/completions", json={"prompt": "Who", "max_tokens": 4, "model": name})
            assert (asked.status_code, asked.json()["model"]) == (200, name)
        status, listed = await asyncio.to_thread(kept.ask, "/v1/models")
        assert (status, [model["id"] for model in listed["data"]]) == (200, [name])
    assert kept.made <= 1 + 4, "a swap costs it one connection at the most"
    body = b'{"prompt": "Who", "max_tokens": 4}'
    raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:9])
    await how(three, "carl")  # in the middle of its request
    raw.sendall(body[9:])
    said = await asyncio.to_thread(raw.recv, 1 << 16)
    assert said.startswith(b"HTTP/1.1 200 ") and b"onnection: close" in said, said
    raw.close()
    await client.aclose()


async def test_a_connection_that_is_kept_wakes_what_rests_and_is_told_where_nothing_is_active(
    three: Remote, kept: KeepAliveConnection
) -> None:
    await three.call("SetConfig", "ss", "engines.idle_timeout_s", "1")
    assert await how(three, "ada") == "start"
    assert await asyncio.to_thread(kept.asks) == "ada"
    await eventually(lambda: is_parked(three))
    await three.call("SetConfig", "ss", "engines.idle_timeout_s", "0")
    assert await asyncio.to_thread(kept.asks) == "ada"
    assert await active(three) == wire.model_path("ada")
    assert await asyncio.to_thread(kept.asks) == "ada"
    (job,) = await three.call("Park")
    await three.finished(job)
    assert "no model is active" in await asyncio.to_thread(kept.asks)


async def test_a_model_may_stay_while_others_rest_and_what_rests_may_leave_memory(three: Remote) -> None:
    for key, value in (
        ("models.ada.idle_timeout_s", "0"),
        ("engines.idle_timeout_s", "1"),
        ("engines.on_idle", "evict"),
    ):
        assert await three.call("SetConfig", "ss", key, value) == (False,), "it is in force at once"
    assert await how(three, "bob") == "start"
    await eventually(lambda: is_parked(three))

    async def is_stored() -> bool:
        return bool((await three.model("bob"))["Residency"] == "stored")

    await eventually(is_stored)
    assert await how(three, "ada") == "wake"
    await asyncio.sleep(5)  # twice as long as it takes to notice, and more
    assert await active(three) == wire.model_path("ada")


async def test_the_model_that_the_configuration_names_answers_after_a_start(three: Remote, daemon: Daemon) -> None:
    daemon.stop()
    with daemon.config.open("a") as file:
        file.write('prewarm = "bob"\n[models.bob]\nengine = "torch"\n')
    daemon.start()

    async def answers() -> bool:
        return await active(three) == wire.model_path("bob")

    await eventually(answers)
    assert await how(three, "bob") == "already-active"
    assert await ask(three) == SAYS["bob"]


async def test_a_new_fine_tune_is_ready_before_anybody_asks_for_it(
    remote: Remote, daemon: Daemon, sources: Path
) -> None:
    await import_model(remote, sources / "ada", "ada")
    assert await how(remote, "ada") == "start"
    await remote.call("SetConfig", "ss", "engines.warm_new", "true")
    shutil.copytree(sources / "bob", daemon.models / "bob")
    await remote.model("bob")

    async def is_warm() -> bool:
        return bool((await remote.model("bob"))["Residency"] == "host")

    await eventually(is_warm)
    jobs = {o[wire.JOB]["Kind"]: o[wire.JOB] for o in (await remote.objects()).values() if wire.JOB in o}
    assert jobs["warm-up"]["Subject"] == "bob"
    assert await active(remote) == wire.model_path("ada"), "who answers was not disturbed"
    job = await swap(remote, "bob")
    assert (job["Result"]["how"], job["Result"]["from_tier"]) == ("rebind", "host")
    assert await ask(remote) == SAYS["bob"]


async def test_where_memory_is_full_a_new_model_stays_on_the_disk(
    remote: Remote, daemon: Daemon, sources: Path, tmp_path: Path
) -> None:
    await import_model(remote, sources / "ada", "ada")
    await remote.finished((await remote.call("Load", "ssa{sv}", "ada", "host", {}))[0])
    size_bytes = (await remote.model("ada"))["SizeBytes"]
    daemon.stop()
    with daemon.config.open("a") as file:
        file.write(f"[memory]\nhost_budget = {size_bytes * 3 // 2}\n")
    daemon.start()
    await remote.finished((await remote.call("Load", "ssa{sv}", "ada", "host", {}))[0])
    await remote.call("SetConfig", "ss", "engines.warm_new", "true")
    await import_model(remote, sources / "bob", "bob")
    await eventually(lambda: "bob is not prepared: there is no free memory for it" in daemon.log.read_text())
    assert ((await remote.model("ada"))["Residency"], (await remote.model("bob"))["Residency"]) == ("host", "stored")


async def test_parked_engines_go_where_memory_is_short(three: Remote, daemon: Daemon) -> None:
    assert await how(three, "ada") == "start"
    assert await how(three, "carl") == "start"
    assert await three.call("SetConfig", "ss", "engines.spare", "1000TB") == (False,)

    async def one_is_left() -> bool:
        return [engine["State"] for engine in (await engines(three)).values()] == ["serving"]

    await eventually(one_is_left)
    assert await active(three) == wire.model_path("carl")
    assert "a parked engine is stopped" in daemon.log.read_text()


async def test_a_models_own_kind_of_engine_counts(three: Remote, daemon: Daemon) -> None:
    await three.call("SetConfig", "ss", "engines.vllm.python", "/nonexistent/python")
    await three.call("SetConfig", "ss", "models.ada.engine", "vllm")
    failed = await swap(three, "ada")
    assert failed["State"] == "failed" and "vllm" in failed["Error"][1].lower(), failed["Error"]
    assert await how(three, "bob") == "start"


async def test_drop_two_sources_swap_between_them_and_stop(remote: Remote, daemon: Daemon, sources: Path) -> None:
    """The main job as the quick start shows it, and nothing is left running after it."""
    for name in ("ada", "bob"):
        shutil.copytree(sources / name, daemon.models / name)
        await remote.model(name)
    for name in ("ada", "bob", "ada"):
        await how(remote, name)
        assert await ask(remote) == SAYS[name]
    pids = [engine["Pid"] for engine in (await engines(remote)).values()]
    await remote.call("Stop")
    assert daemon.process is not None
    assert await asyncio.to_thread(daemon.process.wait, 10) == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not (daemon.runtime / "run" / "openai.sock").is_symlink()


async def test_a_model_that_is_not_there_is_not_swapped_to(lasting: Remote) -> None:
    with pytest.raises(NotFound):
        await swap(lasting, "nobody")
    with pytest.raises(FlashdError):
        await lasting.call("Stop", path=wire.engine_path(7), interface=wire.ENGINE)


async def test_bench_swap_goes_back_and_forth_until_the_first_token(lasting: Remote, shared: Daemon) -> None:
    command = [sys.executable, "-c", "from flashd.cli import main; main()", "--bus", shared.address]
    process = await asyncio.create_subprocess_exec(
        *command, "bench", "swap", "ada", "bob", "--runs", "2", "--json", stdout=subprocess.PIPE
    )
    told, _ = await process.communicate()
    assert process.returncode == 0
    rows = {row["name"]: row for row in json.loads(told)["rows"]}
    assert set(rows) == {"first_token", "swap.rebind"}
    assert len(rows["swap.rebind"]["runs"]) == 4
    assert rows["swap.rebind"]["limit"] == rows["first_token"]["value"]
