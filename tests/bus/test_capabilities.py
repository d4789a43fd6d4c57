# SPDX-License-Identifier: Apache-2.0
"""What /api/show says of what models do. No engine runs: it is said before one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import ollama
import pytest
from conftest import Daemon, Remote, import_model, running_daemon
from gateways import running_gateway
from running import CONFIG
from waiting import eventually

from flashd.dbus.private_bus import PrivateBus

CALLS = '["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]'
SETTINGS = f"""
[models.torch-tools]
engine = "torch"
arguments = {CALLS}
[models.vllm]
engine = "vllm"
[models.vllm-tools]
engine = "vllm"
arguments = {CALLS}
[models.vllm-no-template]
engine = "vllm"
arguments = {CALLS}
[models.vllm-sees]
engine = "vllm"
"""


@pytest.fixture
def daemon(bus: PrivateBus, tmp_path: Path, short_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(bus.address, tmp_path, short_path)
    daemon.config.write_text(CONFIG + SETTINGS)
    with running_daemon(daemon) as running:
        yield running


@pytest.fixture
async def client(daemon: Daemon, tmp_path: Path, short_path: Path) -> AsyncIterator[ollama.AsyncClient]:
    async with (
        running_gateway(daemon, tmp_path / "gateway.log", short_path / "gateway.sock") as gateway,
        gateway.ollama() as made,
    ):
        yield made


async def test_what_a_model_does_depends_on_its_engine_template_and_configuration(
    daemon: Daemon, remote: Remote, client: ollama.AsyncClient, sources: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    shutil.copytree(sources / "ada", made)
    template = (made / "chat_template.jinja").read_text()
    expected = {}

    async def is_so() -> bool:
        found = {name: (await client.show(name)).capabilities for name in expected}
        return found == expected

    async def add(name: str, *capabilities: str) -> None:
        await import_model(remote, made, name)
        expected[name] = list(capabilities)

    await add("vllm-no-template", "completion")
    (made / "chat_template.jinja").write_text(template + "{% if tools %}{{ tools }}{% endif %}")
    await add("plain", "completion", "embedding")
    await add("torch-tools", "completion", "embedding")
    await add("vllm", "completion")
    await add("vllm-tools", "completion", "tools")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": 8}}))
    await add("vllm-sees", "completion", "vision")
    await eventually(is_so)
    for setting, value in (("plain.engine", "vllm"), ("vllm.arguments", CALLS)):
        await remote.call("SetConfig", "ss", f"models.{setting}", value)
    expected |= {"plain": ["completion"], "vllm": ["completion", "tools"]}
    await eventually(is_so)  # the gateway asks nothing, and so was told
    daemon.stop()
    daemon.start()
    await eventually(is_so)
    assert (await remote.model("vllm-tools"))["Capabilities"] == ["completion", "tools"]
