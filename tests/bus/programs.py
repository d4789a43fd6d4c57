# SPDX-License-Identifier: Apache-2.0
"""Runs the programs of tests/clients, which ask the gateway with other people's libraries."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S

CLIENTS = Path(__file__).parents[1] / "clients"
# Programs, with the prefixes of models' names by which they choose an interface of the gateway.
BY = {
    "langchain_openai": ("",),
    "langchain_ollama": ("",),
    "litellm": ("openai/", "hosted_vllm/", "ollama_chat/", "anthropic/"),
}
# Nothing of the machine's user, and nothing that is looked up in the network.
_QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "NO_PROXY": "127.0.0.1"}


def interpreter() -> str:
    """The Python that has them. The test is skipped if there is none: tests/run makes it."""
    found = subprocess.run([CLIENTS / "environment", "--check"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("there is no environment with the clients: tests/clients/environment makes it")
    return found.stdout.strip()


def environment(home: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8", **_QUIET, **more}


@dataclass(slots=True)
class Program:
    """One that does what it is told: tests/clients/told.py."""

    process: asyncio.subprocess.Process
    log: Path

    async def does(self, what: str, **given: object) -> dict[str, Any]:
        """What it `said`, or its `error` and the `words` of that."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **given}).encode() + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            line = await self.process.stdout.readline()
        assert line, self.log.read_text()
        found: dict[str, Any] = json.loads(line)
        return found

    async def said(self, what: str, **given: object) -> Any:
        found = await self.does(what, **given)
        assert "said" in found, found
        return found["said"]


@contextlib.asynccontextmanager
async def running(by: str, url: str, folder: Path) -> AsyncIterator[Program]:
    log = folder / f"{by}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(interpreter(), CLIENTS / f"by_{by}.py", url),
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
        )
    try:
        yield Program(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
