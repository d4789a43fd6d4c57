# SPDX-License-Identifier: Apache-2.0
"""The time of a conversion, beside that of a plain copy of the same bytes.

    .venv/bin/python tests/bench/convert.py [--gigabytes 2] [--runs 5] [--folder FOLDER]

A sharded source of a Qwen3-like shape is converted, and copied by cp with an fsync behind it: both end with the bytes
on the disk. Interleaved, from a dropped page cache and from a warm one, as a source that was just dropped has it. The
same as PyTorch's pickles pays, once and whatever its size, for a process that imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flashd.bench.report import rate_row, report
from flashd.checkpoint.convert import convert
from flashd.checkpoint.source.reader import SourceFiles

ROWS, COLUMNS = 4096, 4096  # 32 MiB of 16-bit weights
SHARDS = 4


def make_source(folder: Path, size_bytes: int) -> int:
    """Shards with random tensors; returns the bytes of weights."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    layers = max(SHARDS, size_bytes // (ROWS * COLUMNS * 2))
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {}
        for layer in range(shard, layers, SHARDS):
            tensors[f"model.layers.{layer}.mlp.weight"] = rng.integers(0, 1 << 16, (ROWS, COLUMNS), np.uint16)
            tensors[f"model.layers.{layer}.norm.weight"] = rng.integers(0, 1 << 16, (COLUMNS,), np.uint16)
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


_AS_PICKLES = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
weight_map = {}
for number, shard in enumerate(sorted(Path(sys.argv[1]).glob("*.safetensors")), start=1):
    tensors = load_file(shard)
    name = f"pytorch_model-{number:05d}-of-00004.bin"
    torch.save(tensors, Path(sys.argv[2]) / name)
    weight_map |= dict.fromkeys(tensors, name)
(Path(sys.argv[2]) / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
"""


def make_pickled(source: Path, folder: Path) -> None:
    """The same source as torch saves it; in another process, for this one to stay small."""
    folder.mkdir()
    subprocess.run([sys.executable, "-c", _AS_PICKLES, source, folder], check=True)


def drop_cache(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def timed(step: Callable[[Path], None], scratch: Path) -> float:
    target = Path(tempfile.mkdtemp(dir=scratch))
    started = time.perf_counter()
    step(target)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build"))
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source = Path(scratch) / "source"
        size_bytes = make_source(source, int(options.gigabytes * 1e9))
        pickled = Path(scratch) / "pickled"
        make_pickled(source, pickled)

        def converted(target: Path, source: Path = source) -> None:
            with SourceFiles.from_path(source) as files:
                convert(files, target, python=sys.executable)

        def copied(target: Path) -> None:
            files = sorted(source.glob("*.safetensors"))
            subprocess.run(["cp", "--reflink=never", *files, target], check=True)
            for file in target.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())

        steps = {"convert": converted, "convert.pytorch": lambda target: converted(target, pickled), "copy": copied}
        rates: defaultdict[str, list[float]] = defaultdict(list)
        timed(converted, Path(scratch))  # the first touch of memory is the host's affair
        for _ in range(options.runs):
            for state, prepare in (("cold", drop_cache), ("warm", warm_cache)):
                for name in random.sample(sorted(steps), len(steps)):
                    prepare(pickled if name == "convert.pytorch" else source)
                    rates[f"{name}.{state}"].append(size_bytes / timed(steps[name], Path(scratch)) / 1e9)
    rows = [
        rate_row(f"{name}.{state}", rates[f"{name}.{state}"], "GB/s", rates[f"copy.{state}"])
        for name in ("convert", "convert.pytorch")
        for state in ("cold", "warm")
    ]
    command = f"tests/bench/convert.py --gigabytes {options.gigabytes:g} --runs {options.runs}"
    print(report("convert", command, rows).to_json())


if __name__ == "__main__":
    main()
