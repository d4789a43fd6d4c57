# SPDX-License-Identifier: Apache-2.0
"""The cost of loading, storing and merging a fine-tune whose base is already on the machine.

    .venv/bin/python tests/bench/finetunes.py [--layers 10] [--runs 5] [--folder FOLDER]

A base of Qwen3-1.7B's shapes, fine-tunes of it in which some of the layers differ, and adapters merged into it. Loads
go from a dropped page cache into fresh memory, the base resident or not, interleaved. `apply` is the road not taken: a
copy of the resident base to which torch adds the adapter at every load. Room on the disk is measured on a btrfs of its
own, where we may mount one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

from flashd.bench.report import Row, cost_row, report
from flashd.checkpoint.convert import convert
from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.sharing import find_shared
from flashd.checkpoint.source.reader import SourceFiles
from flashd.io.streamer import Options
from flashd.memory.device import HostDevice
from flashd.memory.residency import Memory, Residency
from flashd.memory.transfers import StreamMover
from flashd.store.reflinks import share_blocks
from flashd.units import GiB, MiB

HIDDEN, INNER, KEYS, TOKENS, RANK = 2048, 6144, 1024, 151_936, 16
PARTS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
ADAPTERS = {"attention": ("self_attn.q_proj", "self_attn.v_proj"), "all_linear": tuple(PARTS)}
DIFFERS = (20, 50, 100)


def make_sources(folder: Path, layers: int) -> Mapping[str, Path]:
    """The base, the fine-tunes in percent of their layers, and the adapters, as their trainers save them."""
    torch.manual_seed(0)
    names = [f"model.layers.{layer}.{part}" for layer in range(layers) for part in PARTS]
    base = {f"{name}.weight": torch.randn(PARTS[name.split(".", 3)[3]]).bfloat16() * 0.02 for name in names}
    base["model.embed_tokens.weight"] = torch.randn(TOKENS, HIDDEN).bfloat16() * 0.02
    sources = {"base": folder / "base"}
    save(sources["base"], base)
    for percent in DIFFERS:
        changed = range(layers - layers * percent // 100, layers)
        tuned = {
            name: tensor * 1.01 if percent == 100 or any(f".{layer}." in name for layer in changed) else tensor
            for name, tensor in base.items()
        }
        sources[f"differs_{percent}"] = folder / f"differs_{percent}"
        save(sources[f"differs_{percent}"], tuned)
    for kind, parts in ADAPTERS.items():
        factors = {}
        for name in names:
            if name.split(".", 3)[3] in parts:
                rows, columns = base[f"{name}.weight"].shape
                factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
                factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
        path = sources[f"adapter_{kind}"] = folder / f"adapter_{kind}"
        path.mkdir()
        save_file(factors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 32}))
    return sources


def save(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def converted(source: Path, folder: Path, base: Checkpoint | None = None) -> tuple[Checkpoint, float]:
    """The checkpoint, and the seconds it took."""
    folder.mkdir()
    started = time.perf_counter()
    with SourceFiles.from_path(source) as files:
        convert(files, folder, python=sys.executable, base=base)
    return Checkpoint.open(folder), time.perf_counter() - started


def drop_cache(found: Checkpoint) -> None:
    with found.weights_path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def differing_bytes(found: Checkpoint, base: Checkpoint) -> int:
    runs = find_shared(found.digests(), found.manifest.data_bytes, [base.digests()])
    return sum(run.length for run in runs if run.source is None)


async def loads(checkpoints: Mapping[str, Checkpoint], base: Checkpoint, runs: int) -> Mapping[str, list[float]]:
    """Seconds of loads into the host tier, by name; `.alone` without the base."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(runs + 1):
        for name in random.sample(sorted(checkpoints), len(checkpoints)):
            for how in random.sample(["", ".alone"], 2):
                mover = StreamMover(Options(), verify=True, staging_bytes=32 * MiB)
                residency = Residency([Memory(HostDevice.probe(), 64 * GiB)], mover)
                if not how:
                    (await residency.acquire(base)).release()
                drop_cache(checkpoints[name])
                started = time.perf_counter()
                (await residency.acquire(checkpoints[name])).release()
                seconds[name + how].append(time.perf_counter() - started)
                await residency.stop()
                residency.close()
    return {name: values[1:] for name, values in seconds.items()}  # first touch of memory is the host's affair


def applied(base: Checkpoint, adapter: Path) -> float:
    """Seconds to copy the base, which is in memory, and to add the adapter with torch; the factors are ready."""
    size_bytes = base.manifest.data_bytes
    with base.weights_path.open("rb") as file:
        file.seek(base.extent.offset)
        resident = mmap.mmap(-1, size_bytes)
        file.readinto(memoryview(resident))  # type: ignore[attr-defined]
    factors = load_file(adapter / "adapter_model.safetensors")
    started = time.perf_counter()
    arena = mmap.mmap(-1, size_bytes)
    whole = torch.frombuffer(arena, dtype=torch.uint8)
    whole.copy_(torch.frombuffer(resident, dtype=torch.uint8))
    for tensor in base.header().tensors:
        name = f"base_model.model.{tensor.name.removesuffix('.weight')}.lora_"
        if f"{name}A.weight" in factors:
            part = whole[tensor.extent.offset : tensor.extent.end].view(torch.bfloat16).view(tensor.shape)
            part += (factors[f"{name}B.weight"] @ factors[f"{name}A.weight"]) * 2.0
    return time.perf_counter() - started


def stored(checkpoints: Mapping[str, Checkpoint], base: Checkpoint, folder: Path) -> Mapping[str, int]:
    """Bytes that each takes beside the base on a file system that shares extents; nothing where none can be mounted."""
    maker = shutil.which("mkfs.btrfs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if maker is None or os.geteuid() != 0:
        return {}
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(3 * base.manifest.data_bytes + GiB)
    subprocess.run([maker, "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], check=False, capture_output=True).returncode:
        return {}
    try:
        here = Checkpoint.open(shutil.copytree(base.directory, mounted / "base"))
        taken = {}
        for name, found in checkpoints.items():
            before = used_bytes(mounted)
            copy = shutil.copytree(found.directory, mounted / name)
            share_blocks(Checkpoint.open(copy), [here])
            taken[name] = used_bytes(mounted) - before
            shutil.rmtree(copy)
        return taken
    finally:
        subprocess.run(["umount", mounted], check=True)


def used_bytes(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def measure(folder: Path, layers: int, runs: int, tell: Callable[[str], None]) -> list[Row]:
    tell("making a base, fine-tunes and adapters")
    sources = make_sources(folder, layers)
    base, _ = converted(sources["base"], folder / "base.checkpoint")
    made: dict[str, Checkpoint] = {}
    rows = []
    plain: list[float] = []
    for name, source in sources.items():
        if name != "base":
            tell(f"converting {name}")
            is_adapter = name.startswith("adapter_")
            made[name], seconds = converted(source, folder / f"{name}.checkpoint", base if is_adapter else None)
            if is_adapter:
                rows.append(cost_row(f"merge.{name}", [seconds], "s", median(plain)))
                rows.append(cost_row(f"apply.{name}", [applied(base, source) for _ in range(runs)], "s"))
            else:
                plain.append(seconds)
                shutil.rmtree(source)
    tell("loading")
    seconds_of = asyncio.run(loads(made, base, runs))
    total_bytes = base.manifest.data_bytes
    for name, found in made.items():
        rows.append(cost_row(f"differs.{name}", [differing_bytes(found, base)], "B", total_bytes))
        rows.append(cost_row(f"load.{name}", seconds_of[name], "s", median(seconds_of[f"{name}.alone"])))
    tell("storing")
    for name, taken in stored(made, base, folder).items():
        rows.append(cost_row(f"stored.{name}", [taken], "B", total_bytes))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build"))
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        rows = measure(Path(scratch), options.layers, options.runs, lambda text: print(text, file=sys.stderr))
    command = f"tests/bench/finetunes.py --layers {options.layers} --runs {options.runs}"
    print(report("finetunes", command, rows).to_json())


if __name__ == "__main__":
    main()
