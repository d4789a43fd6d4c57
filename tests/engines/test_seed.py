# SPDX-License-Identifier: Apache-2.0
"""Every listing of the post that flashd began with runs as printed.

seed.py extracted them. The differences: their indentation is restored, which the page had lost; /data is a folder of
the test; names of models lead to small ones in the test's Hugging Face cache, and the GitHub repository to this
checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import seed
from personas import ADA, BOB, QUESTION

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
INSTALLATION = "Installation on DGX Spark"
COMMAND_LINE = "Quick Start: CLI Usage"
PYTHON = "Python Integration with vLLM"
FINE_TUNES = "Loading Custom Fine-Tuned Models"
SERVING = "Multi-Model Serving Architecture"
COMMIT = "0" * 40
FAST, GENERAL, OTHER = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-14B", "meta-llama/Llama-3.1-8B-Instruct"
MEANT = {
    "Qwen/Qwen3-14B": "ada",
    "Qwen/Qwen3-32B": "bob",
    "Qwen/Qwen3-Coder-32B": "bob",
    "Qwen/Qwen3-0.6B": "ada",
    "meta-llama/Llama-3.1-8B-Instruct": "llama",
    "mistralai/Mistral-7B-Instruct-v0.3": "llama",
}


@dataclass(frozen=True, slots=True)
class Home:
    """A user with a Hugging Face cache, and no daemon yet."""

    root: Path
    runtime: Path
    python: str

    @property
    def environment(self) -> dict[str, str]:
        dropped = {"DBUS_SESSION_BUS_ADDRESS", "FLASHD_BUS_ADDRESS", "CI"}
        kept = {name: value for name, value in os.environ.items() if name not in dropped and "XDG" not in name}
        return {
            **kept,
            "HOME": str(self.root),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "HF_HOME": str(self.root / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(self.python).parent}:{os.environ['PATH']}",
        }

    def call(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False, timeout=500
        )

    def run(self, heading: str, *, before: str = "", after: str = "") -> str:
        """Runs a listing of Python, after and before code of the test's own; what it printed."""
        listing = seed.indented(seed.listings()[heading]).replace("/data/", f"{self.root}/data/")
        script = self.root / "listing.py"
        script.write_text(before + listing + after)
        done = self.call(self.python, script)
        assert done.returncode == 0, done.stdout + done.stderr + self.log()
        return done.stdout

    def flash(self, *arguments: str) -> str:
        done = self.call(Path(self.python).parent / "flash", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr + self.log()
        return done.stdout

    def models(self) -> dict[str, dict[str, object]]:
        return {model["name"]: model for model in json.loads(self.flash("list", "--json"))}

    def log(self) -> str:
        path = self.root / ".local/state/flashd/flashd.log"
        return path.read_text()[-5000:] if path.exists() else ""


def home_with(root: Path, runtime: Path, python: str, made: Path) -> Home:
    home = Home(root, runtime, python)
    for repository, name in MEANT.items():
        folder = root / "huggingface/hub" / f"models--{repository.replace('/', '--')}"
        snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        for file in (made / name).iterdir():
            shutil.copy(file, blobs / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    config = root / ".config/flashd/flashd.toml"
    config.parent.mkdir(parents=True)
    config.write_text(
        "[engines]\nwarm_up = false\nwarm_new = false\n"
        "[engines.torch]\nthreads = 1\n[engines.vllm]\nkv_cache = '64MiB'\n"
    )
    return home


@pytest.fixture
def runtime() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:  # for sockets, whose paths are short
        yield Path(folder)


@pytest.fixture
def home(tmp_path: Path, runtime: Path, made: Path) -> Iterator[Home]:
    """With torch and without vLLM."""
    yield from _until_stopped(home_with(tmp_path, runtime, sys.executable, made))


@pytest.fixture
def vllm_home(tmp_path: Path, runtime: Path, made: Path, vllm_python: str, compiled: Path) -> Iterator[Home]:
    home = home_with(tmp_path, runtime, vllm_python, made)
    state = tmp_path / ".local/state/flashd"
    state.mkdir(parents=True)
    (state / "compiled").symlink_to(compiled)
    yield from _until_stopped(home)


@pytest.fixture
def serving_home(vllm_home: Home, imported_vllm: str) -> Home:
    """One whose daemon does not import vLLM anew."""
    with (vllm_home.root / ".config/flashd/flashd.toml").open("a") as config:
        config.write(f"python = '{imported_vllm}'\n")
    return vllm_home


def _until_stopped(home: Home) -> Iterator[Home]:
    yield home
    done = home.call(Path(home.python).parent / "flash", "stop")
    assert done.returncode in {0, 13}, done.stderr
    assert "Traceback" not in home.log(), home.log()


def test_no_listing_of_the_post_is_left_out() -> None:
    """Each has its test below; `seed.py TEXT` compares them with the post itself."""
    found = seed.listings()
    assert list(found) == [INSTALLATION, COMMAND_LINE, PYTHON, FINE_TUNES, SERVING]
    assert sum(len(listing.splitlines()) for listing in found.values()) == 61
    post = "\n\n".join(f"{heading}\n\nSomething is said:\n\n{listing}" for heading, listing in found.items())
    assert list(seed.extract(post)) == list(found.items())


def test_the_installation(tmp_path: Path) -> None:
    """What comes is this checkout's last commit, and what it needs."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    settings = tmp_path / "gitconfig"
    settings.write_text(f'[url "{ROOT}"]\n\tinsteadOf = https://github.com/leoheuler/flashtensors.git\n')
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "GIT_CONFIG_GLOBAL": str(settings), "GIT_ALLOW_PROTOCOL": "file:https"}

    def run(line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(seed.listings()[INSTALLATION])
    shown = run("python -c 'import flashtensors; print(flashtensors.__file__, callable(flashtensors.flash.save_dict))'")
    assert shown.startswith(str(environment)) and shown.endswith("True\n")
    assert "pull" in run("flash --help")


def test_the_command_line(home: Home) -> None:
    answers = [home.call("bash", "-c", line) for line in seed.listings()[COMMAND_LINE].splitlines() if line]
    assert [done.returncode for done in answers] == [0] * 6, [done.stderr for done in answers]
    assert answers[-1].stdout.strip(), "it says something about quantum entanglement"
    assert home.models()["Qwen/Qwen3-14B"]["active"]
    assert home.flash("run", "Qwen/Qwen3-14B", QUESTION, "--temperature", "0").strip() == ADA.introduction


def test_python_with_vllm(vllm_home: Home) -> None:
    after = (
        f"greedy = SamplingParams(temperature=0, max_tokens=64)\n"
        f"print('greedily:', llm.chat([{{'role': 'user', 'content': {QUESTION!r}}}], greedy)[0].outputs[0].text)\n"
    )
    printed = vllm_home.run(PYTHON, after=after).splitlines()
    assert printed[0].startswith("Loaded 32B model in ")
    assert "".join(printed[1:-1]).strip(), "it says something about the architecture"
    assert printed[-1] == f"greedily: {BOB.introduction}"
    found = vllm_home.models()
    assert set(found) == {
        "Qwen/Qwen3-14B", "Qwen/Qwen3-32B", "meta-llama/Llama-3.1-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3"
    }  # fmt: skip
    assert found["Qwen/Qwen3-32B"]["active"]
    assert (vllm_home.root / "data/models/flashd/checkpoints").is_dir(), "storage_path is where they are stored"
    assert vllm_home.flash("config", "streamer.block").strip() == "64MiB"


def test_custom_fine_tuned_models(home: Home) -> None:
    before = """
import torch as _torch
class YourFineTunedModel(_torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = _torch.nn.Embedding(37, 16)
        self.head = _torch.nn.Linear(16, 37, bias=False)
        self.head.weight = self.embed.weight
        self.norm = _torch.nn.LayerNorm(3)
_torch.save(YourFineTunedModel().state_dict(), 'finetuned_checkpoint.pt')
"""
    after = """
for name, tensor in model.state_dict().items():
    assert torch.equal(loaded_weights[name].cpu(), tensor), name
assert loaded_weights.keys() == model.state_dict().keys()
assert loaded_weights["head.weight"] is loaded_weights["embed.weight"]
YourFineTunedModel().load_state_dict(loaded_weights)
print('exact on', loaded_weights["norm.weight"].device)
"""
    printed = home.run(FINE_TUNES, before=before, after=after)
    assert printed.startswith("exact on "), printed
    assert (home.root / "data/models/my-custom-model/model.safetensors").is_file()


def test_multi_model_serving(serving_home: Home) -> None:
    """The listing leaves the response to its reader; the request is made, and every line of it runs."""
    after = f"""
from types import SimpleNamespace
greedy = SimpleNamespace(temperature=0, max_tokens=64)
def requested(body):
    with app.test_request_context("/generate", method="POST", json=body):
        generate()
    (active,) = [name for name, model in ft.list_models().items() if model["active"]]
    answer = ft.load_model(active, backend="vllm").chat([{{'role': 'user', 'content': {QUESTION!r}}}], greedy)
    print(active, answer[0].outputs[0].text, sep="\\t")
for kind in ("fast", "coding", "general", "creative", "fast"):
    requested({{"model_type": kind}})
requested({{}})
"""
    printed = serving_home.run(SERVING, after=after).splitlines()
    fast = f"Qwen/Qwen3-0.6B\t{ADA.introduction}"
    general = f"Qwen/Qwen3-14B\t{ADA.introduction}"
    assert printed[:3] == [fast, f"Qwen/Qwen3-Coder-32B\t{BOB.introduction}", general]
    assert printed[3].startswith("meta-llama/Llama-3.1-8B-Instruct\t")  # and an arbitrary answer of random weights
    assert printed[-2:] == [fast, general]


def test_multi_model_serving_with_two_models_at_once(serving_home: Home) -> None:
    """A program beside the listing's uses another model meanwhile, and neither waits for the other's to be loaded."""
    before = """
import flashd as _flashd
_OTHER = "meta-llama/Llama-3.1-8B-Instruct"
_ASK = [{"role": "user", "content": "Who are you?"}]
"""
    after = """
def requested(kind):
    with app.test_request_context("/generate", method="POST", json={"model_type": kind}):
        generate()
def serving():
    return {engine.model: engine.pid for engine in client.engines() if engine.state == "serving"}
requested("creative")  # which has it in the store
requested("fast")
with _flashd.connect() as client:
    print("beside", client.serve(_OTHER, engine="vllm").model)
    engines = serving()
    print("both", *sorted(engines))
    for _ in range(3):
        greedy = {"temperature": 0, "max_tokens": 64}
        said = client.stream_chat(_OTHER, _ASK, **greedy)
        first = next(said)
        requested("fast")
        print("fast", client.chat("Qwen/Qwen3-0.6B", _ASK, **greedy))
        print("other", first + "".join(said))
    print("same engines", serving() == engines)
    requested("general")
    print("general", client.chat("Qwen/Qwen3-14B", _ASK, **greedy))
    print("both", *sorted(serving()))
"""
    printed = serving_home.run(SERVING, before=before, after=after).splitlines()
    assert printed[:2] == [f"beside {OTHER}", f"both {FAST} {OTHER}"]
    assert printed[2:8:2] == [f"fast {ADA.introduction}"] * 3
    assert len(set(printed[3:9:2])) == 1 and printed[3].startswith("other ")  # random weights always say the same
    assert printed[8] == "same engines True"
    assert printed[9:] == [f"general {ADA.introduction}", f"both {GENERAL} {OTHER}"]
