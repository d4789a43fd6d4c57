# SPDX-License-Identifier: Apache-2.0
"""Real engine processes: one zygote of each kind for all tests, and small models."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import imported
import kept
import made_models
import pytest
import pytest_asyncio
from vllm_python import VllmPython
from vllm_python import running as vllm_python_running
from vllm_python import version as vllm_version

sys.path.append(str(Path(__file__).parents[1] / "bus"))  # for a running daemon

from flashd.checkpoint.convert import convert
from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.source.reader import SourceFiles
from flashd.engines.engine import (
    NO_OPTIONS,
    Binding,
    BoundWeights,
    EngineState,
    ModelIdentity,
    RankMemory,
    StoredFile,
)
from flashd.engines.process import EngineProcess, Settings, ZygoteFactory, torch_factory
from flashd.engines.vllm_factory import VllmFactory, environment
from flashd.io.streamer import OpenFile, Read, blake3, load
from flashd.memory.arena import HostArena, HugePages
from flashd.units import MiB

_QUANTISED = Path(__file__).parents[1] / "quantised_models.py"
_MAKE = """
import sys, pathlib, json, shutil, safetensors.torch, torch, transformers
import made_models, quantised_models
from transformers import (
    BartConfig, BartForConditionalGeneration, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig,
    Qwen3MoeForCausalLM, T5Config, T5ForConditionalGeneration,
)
folder = pathlib.Path(sys.argv[1])
made_models.put(folder, "ada", "bob")
size = len(transformers.AutoTokenizer.from_pretrained(folder / "ada"))
torch.manual_seed(3)
small = dict(vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=256)
moe = Qwen3MoeConfig(**small, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                     head_dim=32)
bart = BartForConditionalGeneration(BartConfig(
    vocab_size=400, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2))
bart.generation_config.num_beams, bart.generation_config.early_stopping = 4, True
bart.generation_config.no_repeat_ngram_size = 3
models = {
    "llama": LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=False)),
    "moe": Qwen3MoeForCausalLM(moe),
    "moe2": Qwen3MoeForCausalLM(moe),
    "bert": BertModel(BertConfig(**small)),
    "t5": T5ForConditionalGeneration(T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2)),
    "bart": bart,
}
for name, model in models.items():
    model.save_pretrained(folder / name)
    for file in (folder / "ada").glob("*token*"):
        shutil.copy(file, folder / name)
    shutil.copy(folder / "ada" / "chat_template.jinja", folder / name)
quantised_models.make_quantised(folder / "ada", folder / "int8", "compressed-tensors")
# Two whose config says that the output layer is the embedding, and that have one of their own all the same.
tensors = safetensors.torch.load_file(folder / "ada" / "model.safetensors")
embedding = tensors["model.embed_tokens.weight"]
for name, output in (("copied", embedding.clone()), ("untied", embedding.flip(0).contiguous())):
    shutil.copytree(folder / "ada", folder / name)
    safetensors.torch.save_file({**tensors, "lm_head.weight": output}, folder / name / "model.safetensors")
prompt = "Hello, who are you?"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ada")
expected = {}
for name in ("ada", "bob", "llama", "moe", "copied", "untied"):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                         pad_token_id=tokenizer.pad_token_id)
    expected[name] = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
bert = transformers.BertModel.from_pretrained(folder / "bert").eval()
batch = tokenizer(prompt, return_tensors="pt")
hidden = bert(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[0].float()
expected["bert states"] = hidden.tolist()
expected["bert"] = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).tolist()
(folder / "expected.json").write_text(json.dumps({"prompt": prompt, **expected}))
"""


@pytest.fixture(scope="session")
def made() -> Path:
    """Source folders of several architectures, one also quantised, and what transformers itself answers with them."""
    recipe = (*made_models.recipe(), _MAKE, _QUANTISED)
    return kept.folder("engine-models", *recipe, make=lambda partial: made_models.run(_MAKE, partial))


@pytest.fixture(scope="session")
def expected(made: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / "expected.json").read_text())
    return found


class Resident:
    """A converted model in an arena."""

    def __init__(self, source: Path, directory: Path) -> None:
        directory.mkdir()
        with SourceFiles.from_path(source) as files:
            convert(files, directory, python=sys.executable)
        self.checkpoint = Checkpoint.open(directory)
        extent = self.checkpoint.extent
        self.arena = HostArena(extent.length, source.name, HugePages.NONE)
        with self.checkpoint.weights_path.open("rb") as file:
            opened = OpenFile(file.fileno(), source.name)
            reads = [Read(0, extent.offset, 0, extent.length)]
            with load([opened], reads, address=self.arena.address, size_bytes=self.arena.mapped_bytes) as transfer:
                transfer.wait()
        self.arena.seal()
        self.name = source.name

    def binding(
        self, *, side_files: Mapping[str, Path] | None = None, arena_fd: int | None = None, layout: str | None = None
    ) -> Binding:
        """All of the model, or with something wrong or different about it."""
        memory = RankMemory(
            self.arena.fd if arena_fd is None else arena_fd,
            self.arena.size_bytes,
            self.checkpoint.layout_json() if layout is None else layout,
        )
        names = (self.name, "alias-of-" + self.name)
        paths = self.checkpoint.side_files() if side_files is None else side_files
        return Binding(
            ModelIdentity(self.name, names, self.checkpoint.id, None, NO_OPTIONS),
            BoundWeights((memory,), (self.checkpoint.id,)),
            {name: StoredFile(path, blake3(path.read_bytes()).hex()) for name, path in paths.items()},
        )

    def digest(self) -> int:
        with mmap.mmap(self.arena.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            return hash(mapped[:])


@pytest.fixture(scope="session")
def residents(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Resident]:
    root = tmp_path_factory.mktemp("checkpoints")
    names = ("ada", "bob", "llama", "moe", "moe2", "bert", "int8", "copied", "untied")
    return {name: Resident(made / name, root / name) for name in names}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def factory(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ZygoteFactory]:
    root = tmp_path_factory.mktemp("run")
    settings = Settings(sys.executable, root, root / "logs", 1, 64, 60.0)
    made = torch_factory(settings)
    made.begin()
    yield made
    await made.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Has vLLM compute with one thread: several tests run at once, and threads that wait for each other spin."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        patched.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each rank of several requires its own memory node
        yield


@pytest.fixture(scope="session", autouse=True)
def torch_python(imported_torch: Path) -> Path:
    """For all daemons of these tests."""
    return imported_torch


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM for the processor; tests/run makes it."""
    if os.environ.get("FLASHD_TESTS_WITHOUT_VLLM"):
        pytest.skip("the tests of vLLM are left out: tests/run without --without-vllm runs them")
    script = Path(__file__).parents[2] / "packaging" / "vllm-environment"
    found = subprocess.run([script, "--check"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip("there is no environment with vLLM: packaging/vllm-environment makes it")
    return found.stdout.strip()


@pytest.fixture(scope="session")
def compiled(vllm_python: str) -> Path:
    """What vLLM's processes compile, and find under keys of their own. Runs with the same code for vLLM share it."""
    code = sorted((Path(__file__).parents[2] / "flashd" / "workers" / "vllm").glob("*.py"))
    return kept.folder("compiled", vllm_version(vllm_python), processor(), *code, make=lambda partial: None)


@pytest.fixture(scope="session")
def imported_vllm(vllm_python: str, compiled: Path, one_thread: None) -> Iterator[str]:
    """The program for `engines.vllm.python` by which engines of several daemons and factories import vLLM once."""
    with imported.python(vllm_python, imported.VLLM, environment(compiled)) as program:
        yield str(program)


@pytest.fixture(scope="session")
def vllm(
    vllm_python: str, compiled: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmPython]:
    """vLLM's interpreter, for programs that need no engine of ours."""
    with vllm_python_running(vllm_python, compiled, tmp_path_factory.mktemp("vllm")) as running:
        yield running


def known_answers(vllm: VllmPython, jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns what `vllm.answers(jobs)` does. Answers are kept for models in kept folders, such as `made`."""
    program = Path(__file__).with_name("vllm_greedy.py")

    def ask(folder: Path) -> None:
        (folder / "answers.json").write_text(json.dumps(vllm.answers(jobs)))

    folder = kept.folder("vllm-answers", program, vllm.version(), processor(), json.dumps(jobs), make=ask)
    found: list[Any] = json.loads((folder / "answers.json").read_text())
    return found


def processor() -> str:
    """Returns what of this machine's processor may change the rounding of results."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join([str(len(os.sched_getaffinity(0))), *sorted(found)])


@pytest.fixture(scope="session")
def plain(vllm: VllmPython, made: Path) -> dict[str, list[list[int]]]:
    """The answers of vLLM with its own loader."""
    names = ["ada", "bob", "llama", "moe", "moe2", "int8", "copied", "untied"]
    jobs = [{"model": str(made / name), "load_format": "auto"} for name in names]
    return dict(zip(names, known_answers(vllm, jobs), strict=True))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_factory(imported_vllm: str, compiled: Path) -> AsyncIterator[VllmFactory]:
    with tempfile.TemporaryDirectory(prefix="fd-") as short:  # for sockets, whose paths are short
        root = Path(short)
        settings = Settings(
            imported_vllm,
            root,
            root / "logs",
            1,
            64,
            100.0,
            environment=environment(compiled),
            options={"arguments": ["--seed", "0"], "adapters": [], "kv_cache_bytes": 64 * MiB},
        )
        made = VllmFactory(settings, ())
        made.begin()
        yield made
        await made.close()


Start = Callable[[Binding], Awaitable[EngineProcess]]


@pytest_asyncio.fixture(loop_scope="session")
async def start(factory: ZygoteFactory) -> AsyncIterator[Start]:
    """Starts engines, and ends them with the test."""
    engines: list[EngineProcess] = []

    async def started(binding: Binding) -> EngineProcess:
        engine = factory.create()
        engines.append(engine)
        await engine.start(binding)
        return engine

    yield started
    for engine in engines:
        await engine.stop()
        assert engine.state is EngineState.FAILED and not engine.socket_path.exists()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def hosted(factory: ZygoteFactory, residents: dict[str, Resident]) -> AsyncIterator[EngineProcess]:
    """One engine for all bad requests: it must survive each."""
    engine = factory.create()
    await engine.start(residents["ada"].binding())
    yield engine
    await engine.stop()


def http(engine: EngineProcess) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(engine.socket_path))
    return httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60)


async def complete(engine: EngineProcess, prompt: str, **parameters: Any) -> str:
    async with http(engine) as client:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 24, **parameters}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])
