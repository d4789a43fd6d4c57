# SPDX-License-Identifier: Apache-2.0
"""Recordings are transcribed at the gateway by a real Whisper, in an engine of vLLM that flashd started."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from gateways import Gateway, running_gateway
from made_whisper import make_whisper, recording
from manager import Manager, start
from running import Daemon
from waiting import PATIENCE_S

import flashd
from flashd.dbus.private_bus import PrivateBus

pytestmark = pytest.mark.timeout(300)
TRANSCRIBE = "/v1/audio/transcriptions"
ASK = {"language": "en", "temperature": "0", "max_completion_tokens": "20"}
HEARD = {"file": ("a.wav", recording(), "audio/wav")}


@pytest.fixture(scope="module")
def daemon(
    vllm_python: str, imported_vllm: str, compiled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    if subprocess.run([vllm_python, "-c", "import soundfile"], capture_output=True, check=False).returncode != 0:
        pytest.skip("the environment with vLLM reads no sound: packaging/vllm-environment adds soundfile")
    whisper = tmp_path_factory.mktemp("models") / "whisper"
    make_whisper(whisper)
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        manager = Manager(Path(folder) / "manager")
        manager.open()
        running = Daemon(bus.address, Path(folder), Path(folder))
        running.config.write_text(
            "[engines]\nwarm_up = false\nwarm_new = false\ndefault = 'vllm'\n"
            f"[engines.vllm]\npython = '{imported_vllm}'\nkv_cache = '64MiB'\n"
            "arguments = ['--seed', '0', '--max-num-batched-tokens', '4096', '--max-num-seqs', '2']\n"
        )
        running.share_compiled(compiled)
        start(running, manager)
        try:
            with flashd.connect(bus.address) as client:
                client.import_(whisper, "whisper", aliases=["ears"])
            yield running
        finally:
            manager.empty()
            status, words = running.stop(), running.log.read_text()
            manager.close()
    assert status == 0 and "Traceback" not in words, words


@pytest.fixture
async def gateway(daemon: Daemon, tmp_path: Path) -> AsyncIterator[Gateway]:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:
        async with running_gateway(daemon, tmp_path / "gateway.log", Path(folder) / "gateway.sock") as running:
            yield running


def text_of(stream: str) -> str:
    """What the events of a streamed answer say together."""
    said = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in said for choice in event["choices"])


async def test_a_recording_is_transcribed_as_by_the_engine_itself(daemon: Daemon, gateway: Gateway) -> None:
    async with gateway.openai() as client:
        said = await client.audio.transcriptions.create(
            model="whisper", file=HEARD["file"], language="en", temperature=0, extra_body={"max_completion_tokens": 20}
        )
    with flashd.connect(daemon.address) as bus:
        (engine,) = [each for each in bus.engines() if each.model == "whisper"]
    transport = httpx.AsyncHTTPTransport(uds=engine.endpoint)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=PATIENCE_S) as engines,
        httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as web,
    ):
        own = await engines.post(TRANSCRIBE, files=HEARD, data={**ASK, "model": "whisper"})
        assert own.status_code == 200 and len(own.json()["text"]) > 20
        assert said.text == own.json()["text"]
        for name in ({"model": "ears"}, {"model": "whisper:latest"}):
            assert (await web.post(TRANSCRIBE, files=HEARD, data={**ASK, **name})).content == own.content
        streamed = await web.post(TRANSCRIBE, files=HEARD, data={**ASK, "model": "ears", "stream": "true"})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert text_of(streamed.text) == said.text and streamed.text.rstrip().endswith("[DONE]")


async def test_what_is_no_recording_is_refused_by_the_engine(gateway: Gateway) -> None:
    async with gateway.openai() as client:
        with pytest.raises(openai.BadRequestError, match="audio"):
            await client.audio.transcriptions.create(model="whisper", file=("a.wav", b"no sound"), language="en")
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as web:
        refused = await web.post(TRANSCRIBE, files={"model": (None, "whisper")})
    assert refused.status_code == 400 and "file" in refused.json()["error"]["message"]
