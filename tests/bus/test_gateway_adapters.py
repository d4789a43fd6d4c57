# SPDX-License-Identifier: Apache-2.0
"""Adapters by name at the gateway, where no engine applies them. tests/engines/test_adapters_both_ways.py has vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import ollama
import openai
import pytest
from conftest import Daemon, Remote, import_model, running_daemon
from gateways import WHO, Gateway
from running import CONFIG
from waiting import PATIENCE_S, eventually

from flashd.dbus.private_bus import PrivateBus


@pytest.fixture
def daemon(bus: PrivateBus, tmp_path: Path, short_path: Path) -> Iterator[Daemon]:
    """Its adapters are `tuned`, whose base is called ada, and one that is nowhere."""
    folder = tmp_path / "adapters" / "one"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/you/Ada", "r": 8}))
    daemon = Daemon(bus.address, tmp_path, short_path)
    adapters = json.dumps([f"tuned={folder}", f"lost={tmp_path / 'nowhere'}"])
    daemon.config.write_text(f"{CONFIG}[engines.vllm]\nadapters = {adapters}\n")
    with running_daemon(daemon) as running:
        yield running


async def test_an_adapter_belongs_to_its_base(daemon: Daemon, remote: Remote, gateway: Gateway, sources: Path) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as web:

        async def listed() -> dict[str, str | None]:
            found = (await web.get("/v1/models")).json()["data"]
            return {model["id"]: model.get("parent") for model in found}

        await import_model(remote, sources / "bob", "bob")
        assert (await remote.model("bob"))["Adapters"] == []
        await import_model(remote, sources / "ada", "someone/ada")
        assert (await remote.model("someone/ada"))["Adapters"] == ["tuned"]

        async def is_listed() -> bool:
            return await listed() == {"bob": None, "someone/ada": None, "tuned": "someone/ada"}

        await eventually(is_listed)
        assert (await web.get("/v1/models/tuned")).json()["parent"] == "someone/ada"
        anthropics = (await web.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()["data"]
        assert [model["id"] for model in anthropics] == ["bob", "someone/ada", "tuned"]
        parents = {"bob:latest": "", "someone/ada:latest": "", "tuned:latest": "someone/ada"}
        tags = (await web.get("/api/tags")).json()["models"]
        assert {model["name"]: model["details"]["parent_model"] for model in tags} == parents
        for name, parent in parents.items():  # programs ask this of all that are listed
            shown = (await web.post("/api/show", json={"model": name})).json()
            assert shown["details"]["parent_model"] == parent and shown["modelfile"] == f"FROM {parent or name[:-7]}\n"
    await eventually(lambda: "the adapter lost=" in daemon.log.read_text())
    daemon.stop()
    daemon.start()

    async def is_known_again() -> bool:
        return (await remote.model("someone/ada"))["Adapters"] == ["tuned"]

    await eventually(is_known_again)


async def test_an_engine_that_applies_none_does_not_answer_as_its_base(
    remote: Remote, gateway: Gateway, sources: Path
) -> None:
    await import_model(remote, sources / "ada", "ada")
    async with gateway.openai() as client:

        async def is_listed() -> bool:
            return [model.id async for model in await client.models.list()] == ["ada", "tuned"]

        await eventually(is_listed)
        with pytest.raises(openai.APIStatusError, match=r"flash config models\.ada\.engine vllm") as refused:
            await client.chat.completions.create(model="tuned", messages=WHO)
        assert refused.value.status_code == 501
        with pytest.raises(openai.NotFoundError, match="did you mean tuned"):
            await client.chat.completions.create(model="tune", messages=WHO)
    async with gateway.ollama() as client:
        with pytest.raises(ollama.ResponseError, match="tuned is an adapter of ada"):
            await client.chat("tuned:latest", WHO)
        assert (await client.show("tuned")).details.parent_model == "ada"  # type: ignore[union-attr]
