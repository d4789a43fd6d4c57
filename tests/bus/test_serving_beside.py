# SPDX-License-Identifier: Apache-2.0
"""Several models serve at once, over the bus, with real engines."""

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
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SAYS, Daemon, Remote, import_model
from dbus_next import Variant
from waiting import eventually

from flashd.client.client import connect
from flashd.dbus import wire
from flashd.errors import FlashdError, NotFound


@pytest.fixture
def three(lasting: Remote) -> Remote:
    return lasting


async def bring(remote: Remote, member: str, name: str) -> dict[str, Any]:
    (job,) = await remote.call(member, "sa{sv}", name, {})
    done = await remote.finished(job)
    assert done["State"] == "done", done["Error"]
    return dict(done["Result"])


async def serving(remote: Remote) -> dict[str, dict[str, Any]]:
    """The engines that serve, by model."""
    found = [each[wire.ENGINE] for each in (await remote.objects()).values() if wire.ENGINE in each]
    return {each["Model"].rsplit("/", 1)[-1]: each for each in found if each["State"] == "serving"}


async def active(remote: Remote) -> str:
    path = await remote.get(wire.ROOT_PATH, wire.MANAGER, "ActiveModel")
    return str(path).strip("/").rsplit("/", 1)[-1] if path != "/" else ""


async def ask(endpoint: str, model: str) -> str:
    transport = httpx.AsyncHTTPTransport(uds=endpoint)
    body = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
    async with httpx.AsyncClient(transport=transport, base_url="http://flashd", timeout=60) as client:
        answer = await client.post("/v1/chat/completions", json=body | {"max_tokens": 40})
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])


async def test_two_architectures_serve_at_once(three: Remote) -> None:
    shared = (await bring(three, "Swap", "ada"))["endpoint"]
    own = (await bring(three, "Serve", "carl"))["endpoint"]
    assert own != shared and await active(three) == "ada"
    engines = await serving(three)
    assert engines.keys() == {"ada", "carl"} and engines["carl"]["Endpoint"] == own
    assert await ask(shared, "ada") == SAYS["ada"] == await ask(engines["ada"]["Endpoint"], "ada")
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=own), base_url="http://flashd") as client:
        answer = await client.post("/v1/completions", json={"model": "carl", "prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200, answer.text
    os.kill(engines["carl"]["Pid"], signal.SIGKILL)

    async def is_back() -> bool:
        found = await serving(three)
        return "carl" in found and found["carl"]["Pid"] != engines["carl"]["Pid"]

    await eventually(is_back)
    assert await active(three) == "ada"
    with pytest.raises(FlashdError, match="serves"):
        await three.call("Remove", path=wire.model_path("carl"), interface=wire.MODEL)
    assert (await three.model("carl"))["Serving"] and not (await three.model("bob"))["Serving"]
    (job,) = await three.call("Park", path=wire.model_path("carl"), interface=wire.MODEL)
    assert (await three.finished(job))["State"] == "done"
    assert (await serving(three)).keys() == {"ada"} and not (await three.model("carl"))["Serving"]
    (job,) = await three.call("Park", path=wire.model_path("carl"), interface=wire.MODEL)
    assert (await three.finished(job))["Error"][0].endswith("NotFound")


async def test_two_fine_tunes_take_turns_in_one_engine(three: Remote) -> None:
    shared = (await bring(three, "Swap", "ada"))["endpoint"]
    (paths,) = await three.call("WouldDisplace", "sa{sv}", "bob", {})
    assert paths == [wire.model_path("ada")]
    (paths,) = await three.call("WouldDisplace", "sa{sv}", "ada", {})
    assert paths == []
    served = await bring(three, "Serve", "bob")
    assert served["how"] == "rebind" and await ask(served["endpoint"], "bob") == SAYS["bob"]
    assert (await serving(three)).keys() == {"bob"} and await active(three) == ""
    resting = await three.get(wire.ROOT_PATH, wire.MANAGER, "RestingModel")
    assert resting == wire.model_path("ada")
    assert await ask(shared, "ada") == SAYS["ada"]  # a request to the endpoint wakes it
    assert await active(three) == "ada" and (await serving(three)).keys() == {"ada"}
    assert (await bring(three, "Serve", "bob"))["how"] == "rebind"
    assert (await bring(three, "Serve", "ada"))["how"] == "rebind"
    assert await active(three) == "ada", "the resting model is the active one wherever it serves again"


async def test_who_keeps_a_connection_to_the_endpoint_is_never_answered_by_another(three: Remote) -> None:
    """Its engine is taken by a model beside; requests without a name are for the active model, which rests."""
    shared = (await bring(three, "Swap", "ada"))["endpoint"]

    class Kept(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(shared)

    kept = Kept("flashd", timeout=60)

    def asked() -> str:
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 40}
        )
        for _ in range(2):
            try:
                kept.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                return str(json.loads(kept.getresponse().read())["choices"][0]["message"]["content"])
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                kept.close()  # like clients that find their connection closed
        raise AssertionError("closed twice")

    assert await asyncio.to_thread(asked) == SAYS["ada"]
    await bring(three, "Serve", "bob")
    assert await active(three) == ""
    assert await asyncio.to_thread(asked) == SAYS["ada"]
    kept.close()


async def test_what_rests_goes_on_resting_when_another_is_parked(three: Remote) -> None:
    shared = (await bring(three, "Swap", "ada"))["endpoint"]
    await bring(three, "Serve", "bob")
    (job,) = await three.call("Park", path=wire.model_path("bob"), interface=wire.MODEL)
    assert (await three.finished(job))["State"] == "done"
    assert await three.get(wire.ROOT_PATH, wire.MANAGER, "RestingModel") == wire.model_path("ada")
    assert await ask(shared, "ada") == SAYS["ada"]


async def test_a_new_version_is_served_in_place_of_the_old_one(remote: Remote, sources: Path) -> None:
    for name in ("ada", "bob", "carl"):
        await import_model(remote, sources / name, name)
    await bring(remote, "Swap", "ada")
    await bring(remote, "Serve", "carl")
    before = await serving(remote)
    shutil.copytree(sources / "carl", sources / "carl again")
    config = json.loads((sources / "carl again" / "config.json").read_text())
    (sources / "carl again" / "config.json").write_text(json.dumps({**config, "initializer_range": 0.5}))
    job = await remote.import_folder(sources / "carl again", "carl", replace=Variant("b", True))
    assert (await remote.finished(job))["State"] == "done"
    assert not (await remote.model("carl"))["Serving"], "only an older version serves"
    await bring(remote, "Serve", "carl")
    assert (await remote.model("carl"))["Serving"] and (await serving(remote)).keys() == {"ada", "carl"}
    assert before["ada"]["Pid"] == (await serving(remote))["ada"]["Pid"]


async def test_python_and_the_command_line_have_a_model_serve_by_themselves(three: Remote, shared: Daemon) -> None:
    who = [{"role": "user", "content": "Who are you?"}]

    def talk() -> None:
        with connect(shared.address) as client:
            for name in ("ada", "bob", "ada"):
                assert client.chat(name, who, temperature=0, max_tokens=40) == SAYS[name]
            assert client.status().active_model == "", "nobody has swapped"
            assert len(client.embeddings("carl", ["a", "b"])) == 2
            with pytest.raises(NotFound):
                client.chat("dora", who)
            client.park("carl")
        env = {**os.environ, "FLASHD_BUS_ADDRESS": shared.address}
        flash = [str(Path(sys.executable).with_name("flash"))]

        def said(*words: str) -> str:
            done = subprocess.run([*flash, *words], env=env, capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        assert "carl answers at " in said("serve", "carl")
        assert "carl, at " in said("status")
        said("park", "carl")
        assert "carl, at " not in said("status")

    await asyncio.to_thread(talk)
