# SPDX-License-Identifier: Apache-2.0
"""The gateway with common programs (langchain, litellm, llm and curl) and an engine on PyTorch.

tests/engines/test_vllm_clients.py has what needs vLLM: tools, and structured output.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import conformance
import httpx
import programs
import pytest
import pytest_asyncio
import yaml
from conftest import SAYS
from gateways import Gateway, make_endless, running_gateway
from running import Daemon
from waiting import PATIENCE_S, until

import flashd
from flashd import Client
from flashd.dbus.private_bus import PrivateBus

QUESTION = "Who are you?"
PAGE = (Path(__file__).parents[2] / "packaging" / "docs" / "clients.md").read_text()
BLOCKS = re.findall(r"^## (.+)\n(?:(?!^## ).*\n)*?^```(\w+)\n((?:.*\n)*?)^```$", PAGE, re.MULTILINE)
every_program = pytest.mark.parametrize("by", programs.BY)


@pytest.fixture(scope="module")
def shared(sources: Path) -> Iterator[Daemon]:
    """A daemon with ada and bob, and dora, who does not come to an end."""
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        make_endless(sources, Path(folder) / "dora")
        daemon = Daemon(bus.address, Path(folder), Path(folder))
        daemon.start()
        try:
            with flashd.connect(bus.address) as client:
                for source in (sources / "ada", sources / "bob", Path(folder) / "dora"):
                    client.import_(source, source.name)
                client.set_aliases("ada", ["my-model"])  # as the documentation calls it
            yield daemon
        finally:
            status, words = daemon.stop(), daemon.log.read_text()
    assert status == 0 and "Traceback" not in words, words


@pytest.fixture
def client(shared: Daemon) -> Iterator[Client]:
    with flashd.connect(shared.address) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(shared: Daemon) -> AsyncIterator[Gateway]:
    async with running_gateway(shared, shared.root / "gateway.log", shared.root / "gateway.sock") as running:
        yield running


def rests(client: Client) -> bool:
    return all(engine.active_requests == 0 for engine in client.engines())


def ends_soon(client: Client) -> None:
    """Whoever asked for an endless answer has left, and its generation, which would take minutes, ends."""
    left = time.monotonic()
    until(lambda: rests(client))
    assert time.monotonic() - left < 30


@every_program
async def test_a_program_asks(by: str, client: Client, gateway: Gateway, tmp_path: Path) -> None:
    """It chats, streams, embeds, is told what is wrong in its own errors, and ends what it leaves."""
    async with programs.running(by, gateway.url, tmp_path) as program:
        for prefix in programs.BY[by]:
            for name in ("ada", "bob"):
                answer = await program.said("chat", name=prefix + name, question=QUESTION)
                assert answer["text"] == SAYS[name] and answer["tokens"] > 5
                pieces = await program.said("stream", name=prefix + name, question=QUESTION)
                assert "".join(pieces) == SAYS[name] and len([piece for piece in pieces if piece]) > 5
            if prefix != "anthropic/":
                assert len(await program.said("embed", name=prefix + "ada", text="a text")) == 256
            unknown = await program.does("chat", name=prefix + "adda", question=QUESTION)
            assert unknown["error"] and "did you mean ada" in unknown["words"], unknown
            refused = await program.does("tools", name=prefix + "ada", question=QUESTION)
            assert refused["error"] and "tools" in refused["words"], refused
            assert await program.said("begin", name=prefix + "dora", question=QUESTION)
            until(lambda: not rests(client))
            await program.said("leave")
            ends_soon(client)


@conformance.every_capability
async def test_an_engine_does_what_is_said_of_it(name: str, gateway: Gateway) -> None:
    await conformance.check(name, "torch", gateway.url, "ada", "ada")


async def test_what_open_webui_asks_is_answered(client: Client, gateway: Gateway) -> None:
    """A replay of requests that Open WebUI was seen to send. It would need 7 GB to be here itself."""
    recording = json.loads((programs.CLIENTS / "open_webui.json").read_text())
    async with httpx.AsyncClient(base_url=gateway.url, headers=recording["headers"], timeout=PATIENCE_S) as web:
        for asked in recording["requests"]:
            method, path, body = asked["method"], asked["path"], asked["body"]
            answer = await web.request(method, path, headers=asked["headers"], json=body)
            if path in ("/api/pull", "/api/delete"):
                assert answer.status_code == 403 and "cannot be pulled" in answer.json()["error"]
                continue
            assert answer.status_code == 200, (asked, answer.text)
            lines = [line for line in answer.text.splitlines() if line]
            if method == "GET":
                assert path in ("/api/version", "/api/ps") or "ada" in answer.text
            elif path.startswith("/v1/") and body.get("stream"):
                events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
                deltas = [choice["delta"] for event in events for choice in event["choices"]]
                assert "".join(delta.get("content", "") for delta in deltas) == SAYS["ada"]
                assert lines[-1] == "data: [DONE]"
            elif path == "/v1/chat/completions":
                message = answer.json()["choices"][0]["message"]
                assert message["role"] == "assistant" and message["content"]
            elif path in ("/api/chat", "/api/generate"):
                said = [json.loads(line) for line in lines]
                assert [line["done"] for line in said] == [False] * (len(said) - 1) + [True]
                text = "".join(line.get("message", {}).get("content", line.get("response", "")) for line in said)
                assert text or body.get("keep_alive") == 0
                if body.get("options", {}).get("seed") == 1:
                    assert text == SAYS["ada"]
            elif path in ("/api/embed", "/v1/embeddings"):
                found = answer.json()
                assert len(found["embeddings"][0] if "embeddings" in found else found["data"][0]["embedding"]) == 256
            else:
                assert path == "/api/show" and answer.json()["details"]["family"] == "qwen3"


@pytest.fixture
def llm(gateway: Gateway, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Begins the command llm, with our models in its configuration as its documentation says."""
    python, home = programs.interpreter(), tmp_path / "llm"
    home.mkdir()
    entry = "- model_id: {0}\n  model_name: {0}\n  api_base: {1}/v1\n  supports_tools: true\n"
    (home / "extra-openai-models.yaml").write_text(
        "".join(entry.format(n, gateway.url) for n in ("ada", "dora", "eve"))
    )

    def begin(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [python, "-m", "llm", *arguments],
            env=programs.environment(tmp_path, LLM_USER_PATH=str(home), PYTHONUNBUFFERED="1"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def test_llm_asks(llm: Callable[..., subprocess.Popen[str]], client: Client) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        asking = llm(*arguments, QUESTION)
        output, error = asking.communicate(timeout=PATIENCE_S)
        return asking.returncode, error or output

    greedy = ("-m", "ada", "-o", "temperature", "0")
    assert said(*greedy) == said(*greedy, "--no-stream") == (0, SAYS["ada"] + "\n")
    status, words = said("-m", "eve")
    assert status and "there is no model 'eve'" in words
    status, words = said("-m", "ada", "-T", "llm_version")
    assert status and "tools" in words


def test_llm_is_interrupted(llm: Callable[..., subprocess.Popen[str]], client: Client) -> None:
    asking = llm("-m", "dora", "-o", "max_tokens", "20000", QUESTION)
    assert asking.stdout is not None and asking.stdout.read(1)
    until(lambda: not rests(client))
    asking.send_signal(signal.SIGINT)
    ends_soon(client)
    asking.communicate(timeout=PATIENCE_S)


class Curl:
    """curl, which shows whatever comes at once (-N)."""

    def __init__(self, gateway: Gateway) -> None:
        if shutil.which("curl") is None:
            pytest.skip("needs curl")
        self._url = gateway.url

    def begin(self, path: str, *arguments: str, **body: object) -> subprocess.Popen[str]:
        data = ["--json", json.dumps(body)] if body else []
        return subprocess.Popen(
            ["curl", "-sSN", "--max-time", str(PATIENCE_S), *arguments, *data, self._url + path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, path: str, *arguments: str, **body: object) -> str:
        asking = self.begin(path, *arguments, **body)
        said, error = asking.communicate(timeout=PATIENCE_S)
        assert asking.returncode == 0, error
        return said


def test_curl_asks(gateway: Gateway) -> None:
    curl = Curl(gateway)
    ask = {"model": "ada", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    assert json.loads(curl.ask("/v1/chat/completions", **ask))["choices"][0]["message"]["content"] == SAYS["ada"]
    *events, last = [line for line in curl.ask("/v1/chat/completions", **ask, stream=True).splitlines() if line]
    assert last == "data: [DONE]" and len(events) > 5
    answers = curl.ask("/api/chat", **{**ask, "temperature": None}, options={"temperature": 0}).splitlines()
    assert "".join(json.loads(line)["message"]["content"] for line in answers) == SAYS["ada"]
    assert json.loads(curl.ask("/v1/messages", **ask, max_tokens=40))["content"][0]["text"] == SAYS["ada"]
    for arguments in (["-I"], ["--compressed"], ["--http1.0"], ["-H", "Expect: 100-continue"]):
        assert "200" in curl.ask("/v1/models", "-w", "%{http_code}", *arguments)
    unknown = curl.ask("/v1/chat/completions", "-w", "%{http_code}", **{**ask, "model": "adda"})
    assert "did you mean ada" in unknown and unknown.endswith("404")
    assert curl.ask("/v1/chat/completions", "-w", "%{http_code}", "--json", "{").endswith("400")


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"stream": True, "max_tokens": 20_000}),
        ("/v1/chat/completions", {"max_tokens": 20_000}),
        ("/v1/messages", {"stream": True, "max_tokens": 20_000}),
        ("/api/chat", {"options": {"num_predict": 20_000}}),
    ],
    ids=["openai", "openai-whole", "anthropic", "ollama"],
)
def test_curl_is_interrupted(path: str, more: dict[str, object], client: Client, gateway: Gateway) -> None:
    asking = Curl(gateway).begin(path, model="dora", messages=[{"role": "user", "content": QUESTION}], **more)
    assert asking.stdout is not None
    if "stream" in more or "options" in more:
        assert asking.stdout.read(1), "what comes is shown at once"
    until(lambda: not rests(client))
    asking.send_signal(signal.SIGINT)
    asking.communicate(timeout=PATIENCE_S)
    ends_soon(client)


async def test_an_answer_during_which_the_gateway_is_stopped_says_so(
    shared: Daemon, client: Client, tmp_path: Path, short_path: Path
) -> None:
    log = tmp_path / "gateway.log"
    async with running_gateway(shared, log, short_path / "gateway.sock") as gateway:
        endless = {"model": "dora", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20_000}
        streamed = Curl(gateway).begin("/v1/chat/completions", **endless, stream=True)
        assert streamed.stdout is not None and streamed.stdout.read(1)
        whole = Curl(gateway).begin("/v1/chat/completions", **endless)
        until(lambda: sum(engine.active_requests for engine in client.engines()) == 2)
        gateway.process.terminate()
        said, _ = streamed.communicate(timeout=PATIENCE_S)
        assert "was stopped during the answer" in said.rstrip().splitlines()[-1], said[-500:]
        said, _ = whole.communicate(timeout=PATIENCE_S)
        assert "was stopped during the answer" in json.loads(said)["error"]["message"]
        assert gateway.process.wait(PATIENCE_S) == 0


# -- the page "Use it from your program" -------------------------------------------------------------------------------


def test_the_page_has_a_block_for_each() -> None:
    kinds = {name: kind for name, kind, _ in BLOCKS}
    assert kinds == {
        "openai": "python", "anthropic": "python", "ollama": "python", "LangChain": "python", "LiteLLM": "python",
        "curl": "console", "llm": "yaml", "Open WebUI": "console", "Continue": "yaml", "Claude Code": "console",
    }  # fmt: skip
    assert PAGE.count("\n```\n") == len(BLOCKS), "none is left out"


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, kind, text in BLOCKS if kind == "python"])
def test_a_program_of_the_page_runs(name: str, text: str, gateway: Gateway, tmp_path: Path) -> None:
    python = programs.interpreter() if name in ("LangChain", "LiteLLM") else sys.executable
    script = tmp_path / "program.py"
    script.write_text(text.replace("http://127.0.0.1:8434", gateway.url))
    done = subprocess.run(
        [python, script], env=programs.environment(tmp_path), capture_output=True, text=True, check=False,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SAYS["ada"] in done.stdout and ("LangChain" not in name or "256" in done.stdout)


def lines_of(name: str) -> list[str]:
    (text,) = [text for found, _, text in BLOCKS if found == name]
    return [line.removeprefix("$ ") for line in text.splitlines()]


def test_the_commands_of_the_page_run(gateway: Gateway) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (line,) = lines_of("curl")
    done = subprocess.run(
        ["bash", "-c", line.replace("http://127.0.0.1:8434", gateway.url)],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    said = [json.loads(piece) for piece in done.stdout.splitlines()]
    assert "".join(piece["response"] for piece in said) == SAYS["ada"] and said[-1]["done"], done.stderr


def test_llm_reads_the_pages_configuration(gateway: Gateway, tmp_path: Path) -> None:
    written = "\n".join(lines_of("llm")).replace("http://127.0.0.1:8434", gateway.url)
    (tmp_path / "extra-openai-models.yaml").write_text(written)
    done = subprocess.run(
        [programs.interpreter(), "-m", "llm", "-m", "my-model", QUESTION],
        env=programs.environment(tmp_path, LLM_USER_PATH=str(tmp_path)), capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout == SAYS["ada"] + "\n", done.stderr


async def test_continue_finds_the_model_where_the_page_says(gateway: Gateway) -> None:
    """Continue itself is an extension of editors; this is what it sends to a provider of the kind openai."""
    told = yaml.safe_load("\n".join(lines_of("Continue")))
    assert told.keys() == {"name", "version", "schema", "models"} and told["schema"] == "v1"
    (model,) = told["models"]
    assert model["provider"] == "openai" and model["apiBase"] == "http://127.0.0.1:8434/v1"
    base = model["apiBase"].replace("http://127.0.0.1:8434", gateway.url)
    body = {"model": model["model"], "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    headers = {"Authorization": f"Bearer {model['apiKey']}", "api-key": model["apiKey"]}
    async with httpx.AsyncClient(timeout=PATIENCE_S) as web:
        answer = await web.post(base + "/chat/completions", json={**body, "max_tokens": 4096}, headers=headers)
    assert answer.status_code == 200 and answer.text.rstrip().endswith("data: [DONE]")


def test_open_webui_and_claude_code_are_told_the_right_addresses() -> None:
    """What they send there is replayed: above, and in tests/engines/test_vllm_clients.py."""
    told, more = [line for line in lines_of("Open WebUI") if line.startswith("export ")]
    assert "OLLAMA_BASE_URL=http://127.0.0.1:8434" in told.split(), "it appends /api/..."
    assert '"legacy"' in more, "else it sends tools with every message"
    told = " ".join(lines_of("Claude Code"))
    assert "ANTHROPIC_BASE_URL=http://127.0.0.1:8434 " in told, "it appends /v1/messages"
