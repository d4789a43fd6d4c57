# SPDX-License-Identifier: Apache-2.0
"""Runs flashd-gateway for a test, and makes models for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from listening import free_port
from running import Daemon
from waiting import PATIENCE_S, eventually

if TYPE_CHECKING:  # each takes a second to import, which only the tests that use it pay
    import anthropic
    import ollama
    import openai

WHO = [{"role": "user", "content": "Who are you?"}]


@dataclass(slots=True)
class Gateway:
    """A running flashd-gateway."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    socket_path: Path
    tokens: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, api_key: str = "none") -> openai.AsyncOpenAI:
        import openai

        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_S)

    def anthropic(self) -> anthropic.AsyncAnthropic:
        import anthropic

        return anthropic.AsyncAnthropic(base_url=self.url, api_key="none", max_retries=0, timeout=PATIENCE_S)

    def ollama(self) -> ollama.AsyncClient:
        import ollama

        return ollama.AsyncClient(host=self.url, timeout=PATIENCE_S)


def make_endless(sources: Path, folder: Path) -> None:
    """A model that learned nothing, and does not come to an end for minutes."""
    shutil.copytree(sources / "carl", folder)
    shutil.copy(sources / "ada" / "chat_template.jinja", folder)
    for file, field in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        told = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(told | {field: 40_000}))


@contextlib.asynccontextmanager
async def running_gateway(
    daemon: Daemon,
    log: Path,
    socket_path: Path,
    *,
    environment: Mapping[str, str] | None = None,
    port: int = 0,
    options: Sequence[str] = (),
) -> AsyncIterator[Gateway]:
    """Yields it once it has heard of the daemon. It must end as told, and have said nothing."""
    port, tokens = port or free_port(), socket_path.with_name("tokens.toml")
    command = [sys.executable, "-m", "flashd.gateway.main", "--bus", daemon.address]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--address", f"127.0.0.1:{port}", "--socket", socket_path, "--tokens", tokens, *options],
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=output,
        )
    running = Gateway(process, port, log, socket_path, tokens)

    async def is_connected() -> bool:
        assert process.poll() is None, log.read_text()
        async with httpx.AsyncClient() as client:
            try:
                return (await client.get(running.url + "/health")).status_code == 200
            except httpx.ConnectError:
                return False

    try:
        await eventually(is_connected)
        yield running
        process.terminate()
        assert process.wait(PATIENCE_S) == 0, log.read_text()
        assert log.read_text() == "", log.read_text()
    finally:
        process.kill()
        process.wait()
