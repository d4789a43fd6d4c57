# SPDX-License-Identifier: Apache-2.0
"""Sound sources of every kind, with bytes, JSON, names and files changed from a seed, and converted.

Each becomes a checkpoint or is refused in words; never anything else. Where it becomes one, every weight is compared
with what safetensors itself reads in the source, with what torch had saved, or with the arithmetic of PEFT.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from campaign import Campaign, main
from gguf_files import F32, STRING, UINT32, Gguf, Value

from flashd.checkpoint.convert import convert
from flashd.checkpoint.files import Checkpoint, verify
from flashd.checkpoint.header import aliases
from flashd.checkpoint.source.reader import SourceFiles, missing_shards
from flashd.checkpoint.source.wrappers import plain_names
from flashd.errors import FlashdError, InvalidSource

LONGEST_ERROR = 1500
SLOWEST_S = 120.0  # a pattern may use five seconds of a processor that others use too
Weights = Mapping[str, bytes]
HOSTILE: list[Any] = [
    None, True, -1, 0, 1 << 70, 10**400, 1.5, 1e308, float("inf"), float("nan"), "", "\x1b[31m", "\ud800", "x" * 5000,
    [], {}, [[]], [[[[[[]]]]]], {"a": {"b": {}}}, ["LlamaForCausalLM"], "(a+)+$", {"(([a-z.]+)+)+!": 2}, {"q_proj": 2},
    {"(": 1}, "../../etc/passwd", "model.safetensors", "NaN", 2,
]  # fmt: skip
NAMES = [
    "model.safetensors", "config.json", "pytorch_model.bin", "model.safetensors.index.json", "adapter_config.json",
    "adapter_model.safetensors", "tokenizer.json", "model.gguf", "model.onnx", "._model.safetensors", "last.ckpt",
    "model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors", "consolidated.00.pth", "model_index.json",
    "optimizer.pt", "zero_to_fp32.py", "x\n.safetensors", "generation_config.json",
]  # fmt: skip
CONTENTS = [
    b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!DOCTYPE html><html></html>",
    b"Entry not found", bytes(600), b"GGUF" + bytes(64), b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(60), b"[" * 5000,
    b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"a": ' + b"9" * 4400 + b"}", b'{"a": 1, "a": 2}',
]  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4,
    "vocab_size": 8, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (8, 4), "model.layers.0.q_proj.weight": (4, 4), "model.layers.0.norm.weight": (4,),
    "model.layers.1.q_proj.weight": (4, 4), "model.layers.1.norm.weight": (4,), "lm_head.weight": (8, 4),
}  # fmt: skip
TUNED = "model.layers.0.q_proj"
WRAPPERS = ["", "", "_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "model.", "_forward_module."]


@dataclass(frozen=True)
class Seed:
    """A sound source: what it must become, or how that is to be read in it."""

    folder: Path
    weights: Weights
    is_adapter: bool = False


def run(campaign: Campaign) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-sources-") as scratch:
        home = Path(scratch)
        base = _converted(_safetensors(home / "base", {}, "").folder, home / "base.checkpoint", None)
        tried = home / "tried"
        while campaign.goes_on():
            shutil.rmtree(tried, ignore_errors=True)
            tried.mkdir()
            _try_one(campaign, tried, base)


def _try_one(campaign: Campaign, home: Path, base: Checkpoint) -> None:
    chance = campaign.random
    # Pickles and adapters start a process that imports torch: one of them for forty of the others.
    make = chance.choice([_pickle, _adapter]) if chance.random() < 0.025 else chance.choice(_QUICK)
    rng = {name: chance.randbytes(4 * math.prod(shape)) for name, shape in SHAPES.items()}
    seed = make(home / "source", rng, chance.choice(WRAPPERS))
    before = _contents(seed.folder)
    done = [chance.choice(MUTATIONS)(campaign, seed.folder) for _ in range(chance.choice([0, 1, 1, 2, 3]))]
    case = f"{make.__name__[1:]}: {'; '.join(done) or 'as it is'}"
    campaign.count("executions")
    began = time.monotonic()
    try:
        missing_shards(seed.folder)
    except InvalidSource:
        pass
    except Exception as defect:  # noqa: BLE001 -- that is what we look for
        campaign.finding(f"{case}: missing_shards: {defect!r}"[:LONGEST_ERROR])
    try:
        checkpoint = _converted(seed.folder, home / "out", base)
    except InvalidSource as error:
        campaign.count("refused")
        _check_words(campaign, case, error)
        if not done:
            campaign.finding(f"{case}: a sound source is refused: {error}")
    except Exception as defect:  # noqa: BLE001 -- another error of ours is a defect too: the source is to blame
        campaign.finding(f"{case}: {defect!r}"[:LONGEST_ERROR])
    else:
        campaign.count("converted")
        if wrong := _wrong(seed, before, checkpoint):
            campaign.finding(f"{case}: {wrong}"[:LONGEST_ERROR])
    if time.monotonic() - began > SLOWEST_S:
        campaign.finding(f"{case}: took {time.monotonic() - began:.0f} s")


def _check_words(campaign: Campaign, case: str, error: FlashdError) -> None:
    if not error.message or len(str(error)) > LONGEST_ERROR:
        campaign.finding(f"{case}: an error of {len(str(error))} characters: {str(error)[:200]}")
    elif not (error.message + error.hint).isprintable():
        campaign.finding(f"{case}: an error that writes to the terminal: {str(error)[:200]!r}")


def _converted(folder: Path, out: Path, base: Checkpoint | None) -> Checkpoint:
    out.mkdir()
    with SourceFiles.from_path(folder) as files:
        convert(files, out, python=sys.executable, base=base)
    checkpoint = Checkpoint.open(out)
    verify(checkpoint)
    return checkpoint


def _contents(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _wrong(seed: Seed, before: Mapping[str, bytes], checkpoint: Checkpoint) -> str:
    """What of the checkpoint is not what the source says; empty if nothing."""
    found = _stored(checkpoint)
    now = _contents(seed.folder)
    if seed.is_adapter and "adapter_config.json" in now:
        wanted = _merged(seed, now)
        if wanted is not None and not np.allclose(np.frombuffer(found[f"{TUNED}.weight"], "<f4"), wanted, 1e-4, 1e-4):
            return f"the merged weights are {found[f'{TUNED}.weight'].hex()}"
        return ""
    is_weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json", ".gguf")
    files = {name: raw for name, raw in now.items() if name.endswith(is_weights)}
    if files == {name: raw for name, raw in before.items() if name.endswith(is_weights)}:
        return "" if found == seed.weights else f"weights differ: {sorted(found.keys() ^ seed.weights.keys())}"
    if found.keys() == {"gguf"} and len(files) == 1:
        return "" if found["gguf"] in files.values() else "the file is not stored as it is"
    if any(not name.endswith((".safetensors", ".index.json")) for name in files):
        return ""  # a changed pickle, or one beside something else
    return _wrong_by_safetensors(found, files)


def _wrong_by_safetensors(found: Weights, files: Mapping[str, bytes]) -> str:
    theirs: dict[str, set[bytes]] = {}
    for name, raw in files.items():
        if name.endswith(".safetensors"):
            try:
                for tensor, described in safetensors.deserialize(raw):
                    theirs.setdefault(tensor, set()).add(bytes(described["data"]))
            except safetensors.SafetensorError:
                continue  # a file that is not used
    try:
        plain = plain_names(theirs)
    except InvalidSource:
        plain = {}
    known = theirs | {plain.get(name, name): theirs[name] for name in theirs}
    for name, raw in found.items():
        if raw not in known.get(name, ()):
            return f"{name} is nothing that safetensors reads in the source"
    return ""


def _stored(checkpoint: Checkpoint) -> Weights:
    header = checkpoint.header()
    raw = checkpoint.weights_path.read_bytes()
    start = header.data_offset
    found = {t.name: raw[start + t.extent.offset : start + t.extent.end] for t in header.tensors}
    return found | {alias: found[name] for alias, name in aliases(header, "x").items()}


def _merged(seed: Seed, now: Mapping[str, bytes]) -> np.ndarray[Any, Any] | None:
    """By PEFT's arithmetic; None where the factors themselves were changed."""
    weights = now.get("adapter_model.safetensors", b"")
    tensors = {}
    try:
        for name, described in safetensors.deserialize(weights):
            tensors[name.rpartition(TUNED + ".")[2]] = np.frombuffer(described["data"], "<f4").reshape(
                described["shape"]
            )
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    except (safetensors.SafetensorError, KeyError, ValueError):
        return None
    said = json.loads(now["adapter_config.json"].decode(json.detect_encoding(now["adapter_config.json"])))

    def of(pattern: str, otherwise: str) -> Any:
        patterns = said.get(pattern) or {}
        fits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", TUNED))
        return next(fits, said.get(otherwise, 8))

    r, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    scale = alpha / (math.sqrt(r) if said.get("use_rslora") else r)
    delta = (b.astype(np.float64) @ a) * scale
    return (np.ones((4, 4)) + delta).astype(np.float32).reshape(-1)


# --- sound sources -----------------------------------------------------------------------------------------------


def _write(path: Path, weights: Weights) -> None:
    header, end = {}, 0
    for name, raw in weights.items():
        shape = SHAPES.get(name.removeprefix(_prefix(name)), (len(raw) // 4,))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(weights.values()))


def _prefix(name: str) -> str:
    return next((name[: -len(plain)] for plain in SHAPES if name.endswith(plain)), "")


def _sides(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')


def _ones() -> Weights:
    return {name: np.ones(shape, "<f4").tobytes() for name, shape in SHAPES.items()}


def _safetensors(folder: Path, weights: Weights, wrapper: str) -> Seed:
    _sides(folder)
    weights = weights or _ones()
    _write(folder / "model.safetensors", {wrapper + name: raw for name, raw in weights.items()})
    return Seed(folder, weights)


def _sharded(folder: Path, weights: Weights, wrapper: str) -> Seed:
    _sides(folder)
    names = list(weights)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[3 * n : 3 * n + 3] for n in range(2)}
    for file, held in shards.items():
        _write(folder / file, {wrapper + name: weights[name] for name in held})
    index = {wrapper + name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return Seed(folder, weights)


def _pickle(folder: Path, weights: Weights, wrapper: str) -> Seed:
    _sides(folder)
    state = {
        wrapper + name: torch.frombuffer(bytearray(raw), dtype=torch.float32).view(SHAPES[name])
        for name, raw in weights.items()
    }
    torch.save({"state_dict": state, "best": np.float64(0.5)}, folder / "pytorch_model.bin")
    return Seed(folder, weights)


def _adapter(folder: Path, weights: Weights, wrapper: str) -> Seed:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2},
        "base_model_name_or_path": "x",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A.weight": np.full((2, 4), 0.5, "<f4"), "lora_B.weight": np.full((4, 2), 0.25, "<f4")}
    header, end = {}, 0
    for name, factor in factors.items():
        described = {"dtype": "F32", "shape": list(factor.shape), "data_offsets": [end, end + factor.nbytes]}
        header[f"base_model.model.{TUNED}.{name}"] = described
        end += factor.nbytes
    text = json.dumps(header).encode()
    raw = b"".join(factor.tobytes() for factor in factors.values())
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw)
    return Seed(folder, weights, is_adapter=True)


def _gguf_of(weights: Weights) -> Gguf:
    entries = {"general.architecture": Value(STRING, "llama"), "llama.context_length": Value(UINT32, 64)}
    return Gguf(entries, {name: (F32, SHAPES[name][::-1], raw) for name, raw in weights.items()})


def _gguf(folder: Path, weights: Weights, _: str) -> Seed:
    raw = _gguf_of(weights).packed()
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(raw)
    return Seed(folder, {"gguf": raw})


def _gguf_parts(folder: Path, weights: Weights, _: str) -> Seed:
    made = _gguf_of(weights)
    made.write_parts(folder, "tiny", 2)
    return Seed(folder, {"gguf": made.packed()})


_QUICK = (_safetensors, _safetensors, _sharded, _sharded, _gguf, _gguf_parts)


# --- mutations: each returns its description --------------------------------------------------------------------------


def _some_file(campaign: Campaign, folder: Path, ending: str = "") -> Path | None:
    files = sorted(path for path in folder.iterdir() if path.name.endswith(ending) and path.is_file())
    return campaign.random.choice(files) if files else None


def _bytes(campaign: Campaign, folder: Path) -> str:
    chance, path = campaign.random, _some_file(campaign, folder)
    if path is None:
        return "nothing"
    raw = bytearray(path.read_bytes())
    places = []
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(min(len(raw), chance.choice([12, 400, 10_000])) + 1)
        raw[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        places.append(place)
    path.write_bytes(raw)
    return f"bytes of {path.name!r} at {places}"


def _cut(campaign: Campaign, folder: Path) -> str:
    path = _some_file(campaign, folder)
    if path is None:
        return "nothing"
    raw = path.read_bytes()
    length = campaign.random.randrange(len(raw) + 1)
    path.write_bytes(raw[:length])
    return f"{path.name!r} cut to {length}"


def _json(campaign: Campaign, folder: Path) -> str:
    chance, path = campaign.random, _some_file(campaign, folder, ".json")
    if path is None:
        return "nothing"
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "nothing"
    encoding = chance.choice(ENCODINGS)
    change = _changed(campaign, document, lambda text: path.write_text(text, encoding=encoding))
    return f"{path.name!r}: {change} in {encoding}"


ENCODINGS = ["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be"]


def _header(campaign: Campaign, folder: Path) -> str:
    path = _some_file(campaign, folder, ".safetensors")
    if path is None:
        return "nothing"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8].ljust(8, b"\0"))
    try:
        document = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError, OverflowError):
        return "nothing"

    def write(text: str) -> None:
        new = text.encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return f"header of {path.name!r}: {_changed(campaign, document, write)}"


def _changed(campaign: Campaign, document: Any, write: Callable[[str], object]) -> str:
    """One value somewhere in a document, or a name, replaced."""
    chance = campaign.random
    place = document
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or chance.random() < 0.4:
            break
        place = place[key]
    if not isinstance(place, dict | list) or not place:
        return "nothing"
    value = chance.choice(HOSTILE)
    if isinstance(place, dict) and chance.random() < 0.3:
        other = chance.choice(["r", "quantization_config", "architectures", "x", "\x1b", *SHAPES, "quantization"])
        if chance.random() < 0.5:
            value, key = place.pop(key), f"{other!r} instead of {key!r}"
        else:
            key = other
        place[other] = value
    else:
        place[key] = value
    write(json.dumps(document))
    return f"{key!r:.90} = {value!r:.60}"


def _file(campaign: Campaign, folder: Path) -> str:
    chance, path = campaign.random, _some_file(campaign, folder)
    name = chance.choice(NAMES)
    way = chance.randrange(4)
    if way == 0 and path is not None:
        path.unlink()
        return f"without {path.name!r}"
    if way == 1 and path is not None:
        path.rename(folder / name)
        return f"{path.name!r} called {name!r}"
    if way == 2 and path is not None:
        shutil.copyfile(path, folder / name) if path.name != name else None
        return f"{path.name!r} also called {name!r}"
    content = chance.choice(CONTENTS)
    (folder / name).write_bytes(content)
    return f"{name!r} is {content[:30]!r}"


MUTATIONS = [_bytes, _cut, _json, _json, _header, _header, _file]


if __name__ == "__main__":
    main(run, whole_s=3600)
