# SPDX-License-Identifier: Apache-2.0
"""`load_model`: its objects answer like those of vLLM and transformers, even if others swap meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flashtensors as ft
import pytest
from personas import ADA, BOB, QUESTION
from running import Daemon

import flashd
from flashd import Client, errors
from flashd.config.environment import child_environment
from flashd.dbus.private_bus import PrivateBus

pytestmark = pytest.mark.timeout(300)
ASK = [{"role": "user", "content": QUESTION}]
GREEDY = SimpleNamespace(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def bus() -> Iterator[str]:
    """A daemon whose default engine is torch."""
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        daemon = Daemon(bus.address, Path(folder), Path(folder))
        daemon.start()
        try:
            yield bus.address
        finally:
            status, words = daemon.stop(), daemon.log.read_text()
    assert status == 0 and "Traceback" not in words, words


@pytest.fixture
def client(bus: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("FLASHD_BUS_ADDRESS", bus)
    for name in ("ada", "bob"):
        ft.register_model(str(made / name))
    with flashd.connect(bus) as client:
        yield client


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_handles_are_swapped_to_when_they_are_asked(client: Client) -> None:
    ada, bob = ft.load_model("ada"), ft.load_model("bob")
    assert client.status().active_model == "bob"
    assert texts(ada.chat(ASK, GREEDY)) == [ADA.introduction]
    assert client.status().active_model == "ada"
    assert texts(bob.chat([ASK, ASK, ASK], GREEDY)) == [BOB.introduction] * 3
    ft.cleanup_gpu()
    assert client.status().active_model == ""
    assert texts(ada.chat(ASK, GREEDY)) == [ADA.introduction]


def test_prompts_and_outputs_are_named_as_vllms(client: Client, expected: dict[str, Any]) -> None:
    ada = ft.load_model("ada", dtype="bfloat16", gpu_memory_utilization=0.5)
    prompt = expected["prompt"]
    params = SimpleNamespace(temperature=0.0, max_tokens=24, top_p=1.0, top_k=0, stop=[], seed=None, n=1)
    for form in (prompt, [prompt], {"prompt": prompt}, [{"prompt": prompt}]):
        (output,) = ada.generate(form, params)
        assert output.prompt == prompt and output.finished
        assert output.outputs[0].text == expected["ada"] and output.outputs[0].index == 0
        assert output.outputs[0].finish_reason in {"stop", "length"} and output.outputs[0].finished()
    several = ada.generate([prompt] * 5, [params] * 5)
    assert texts(several) == [expected["ada"]] * 5
    assert ada.generate([], params) == []


def test_two_who_swap_away_from_each_other_both_get_their_own_answers(client: Client) -> None:
    found: dict[str, list[str]] = {"ada": [], "bob": []}

    def ask(name: str) -> None:
        model = ft.load_model(name)
        for _ in range(6):
            found[name] += texts(model.chat(ASK, GREEDY))

    threads = [threading.Thread(target=ask, args=[name]) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"ada": [ADA.introduction] * 6, "bob": [BOB.introduction] * 6}


def test_everything_that_flashtensors_quick_start_uses(client: Client, made: Path, expected: dict[str, Any]) -> None:
    """Its README's: the same calls and arguments, and what is read of what they return."""
    ft.shutdown_server()
    ft.configure(
        storage_path="/tmp/models", mem_pool_size=1024**3 * 30, chunk_size=1024**2 * 32, num_threads=4,
        gpu_memory_utilization=0.8, server_host="0.0.0.0", server_port=8073,
    )  # fmt: skip
    ft.activate_vllm_integration()
    model_id = str(made / "ada")
    result = ft.register_model(
        model_id=model_id, backend="transformers", torch_dtype="bfloat16", force=False, hf_token=None
    )
    assert result["status"] == "success" and result["backend"] == "transformers"
    assert set(result["metrics"]) == {"total_time", "download_time", "transform_time", "register_time", "model_size"}
    llm = ft.load_model(model_id=model_id, backend="auto", dtype="bfloat16", gpu_memory_utilization=0.8)
    prompt = expected["prompt"]
    for output in llm.generate([prompt, prompt], SimpleNamespace(temperature=0.0, top_p=0.95, max_tokens=24)):
        assert (output.prompt, output.outputs[0].text) == (prompt, expected["ada"])
    ft.cleanup_gpu()
    info = ft.get_model_info(model_id)
    assert info is not None and info["size"] > 0
    assert (info["model_id"], info["backend"], info["ranks"]) == ("ada", "auto", 1)
    assert ft.list_models()["ada"] == info
    assert ft.load_model(model_id, backend=info["backend"]).model == "ada", "what it says can be said"
    with pytest.raises(ConnectionError), pytest.MonkeyPatch.context() as patched:
        patched.setenv("FLASHD_BUS_ADDRESS", "unix:path=/nonexistent")
        ft.connect(server_host="localhost", server_port=8073)


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ("", GREEDY, errors.InvalidArgument),
        (5, GREEDY, TypeError),
        ([5.5], GREEDY, errors.InvalidArgument),
        ({"prompt": "a", "multi_modal_data": {}}, GREEDY, errors.Unsupported),
        ("a", SimpleNamespace(temperature=-1), errors.InvalidArgument),
        ("a", SimpleNamespace(logits_processors=[print]), errors.Unsupported),
        ("a", SimpleNamespace(n=2), errors.InvalidArgument),
        ("a", [GREEDY, GREEDY], errors.InvalidArgument),
    ],
)
def test_what_cannot_be_asked_is_told(prompt: Any, params: Any, error: type[Exception], client: Client) -> None:
    ada = ft.load_model("ada")
    with pytest.raises(error):
        ada.generate(prompt, params)


def test_an_engine_that_is_not_there_is_told(client: Client) -> None:
    with pytest.raises(errors.Unavailable) as failed:
        ft.load_model("ada", backend="vllm")
    assert "engines.vllm.python" in failed.value.hint
    assert texts(ft.load_model("ada").chat(ASK, GREEDY)) == [ADA.introduction]


def test_any_model_of_transformers_in_this_process(client: Client, bus: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "modules_compared.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment({"FLASHD_BUS_ADDRESS": bus, "HF_HUB_OFFLINE": "1"}),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    classes = {
        "whisper": "WhisperForConditionalGeneration",
        "llava": "LlavaForConditionalGeneration",
        "bert": "BertModel",
        "moe": "Qwen3MoeForCausalLM",
    }
    assert {name: report.pop("class") for name, report in found.items()} == classes
    for name, report in found.items():
        auto = "LanguageModel" if name == "moe" else classes[name]
        assert report == {
            "equal": True, "dtypes": ["torch.float32", "torch.bfloat16"], "training": False, "untouched": True,
            "auto": auto, "processor": "WhisperFeatureExtractor" if name == "whisper" else "",
        }, name  # fmt: skip
    assert [model.leases for model in client.models() if model.name in classes and not model.active] == [0, 0, 0]
