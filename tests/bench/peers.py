# SPDX-License-Identifier: Apache-2.0
"""The time that each loader takes for one checkpoint, from a file to tensors on the GPU.

    tests/bench/peers.py CHECKPOINT [--runs 3] [--how cold,warm] [--peers NAME,...] [--json FILE]

CHECKPOINT is one safetensors file of several gigabytes. Each load happens in a process of its own that has imported its
loader and begun to use the GPU before; `cold` with the file dropped from the page cache, `warm` with all of it in
there; everything interleaved in random order, together with the limits: the barest O_DIRECT read into huge pages, and
one copy of pinned memory. flashd's load goes through its daemon, D-Bus included. Where there is no GPU the tensors stay
on the CPU, and flashd loads to its host tier. Loaders that are not installed are left out, and said to be.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from own_daemon import own_daemon

import flashd
from flashd.bench.copying import Link, device_of
from flashd.bench.report import Row, rate_row, report
from flashd.bench.stream import Ready
from flashd.checkpoint import header
from flashd.io.streamer import ALIGNMENT, raw_read
from flashd.units import MiB

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def with_safetensors(path: str) -> Callable[[], Any]:
    from safetensors.torch import load_file

    if DEVICE != "cpu":
        return lambda: load_file(path, device=DEVICE)
    # Mapped pages are not loaded ones.
    return lambda: {name: tensor.clone() for name, tensor in load_file(path).items()}


def with_fastsafetensors(path: str) -> Callable[[], Any]:
    from fastsafetensors import fastsafe_open

    def load() -> Any:
        with fastsafe_open(filenames=[path], nogds=True, device=DEVICE, debug_log=False) as file:
            return {name: file.get_tensor(name).clone().detach() for name in file.keys()}  # noqa: SIM118

    return load


def with_runai(path: str) -> Callable[[], Any]:
    os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", "16")
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(path)
            return {name: tensor.to(DEVICE, copy=True) for name, tensor in streamer.get_tensors()}

    return load


def with_instanttensor(path: str) -> Callable[[], Any]:
    from instanttensor import safe_open

    def load() -> Any:
        with safe_open([path], framework="pt", device=0) as file:
            return {name: tensor.clone() for name, tensor in file.tensors()}

    return load


PEERS: dict[str, Callable[[str], Callable[[], Any]]] = {
    "safetensors": with_safetensors,
    "fastsafetensors": with_fastsafetensors,
    "runai-model-streamer": with_runai,
    "instanttensor": with_instanttensor,
}


def child(name: str, path: str, how: str) -> None:
    """Prints the seconds of one load."""
    load = PEERS[name](path)
    torch.zeros(1, device=DEVICE)
    prepare(path, how)
    started = time.perf_counter()
    tensors = load()
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - started, "tensors": len(tensors)}))


def prepare(path: str, how: str) -> None:
    """Puts a file into the page cache, or out of it."""
    with Path(path).open("rb") as file:
        if how == "cold":
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(16 * MiB):
                pass


def seconds_of(name: str, path: Path, how: str) -> float | None:
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, str(path), how],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        print(f"{name} is left out: {last[0][:200]}", file=sys.stderr)
        return None
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--how", type=_names_of(["cold", "warm"]), default=["cold", "warm"])
    parser.add_argument("--peers", type=_names_of(PEERS), default=list(PEERS), help="those to compare with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = options.checkpoint.resolve()
    with (
        tempfile.TemporaryDirectory(dir=source.parent, prefix=".peers-") as folder,
        own_daemon(Path(folder), "[engines]\nwarm_up = false\nwarm_new = false\n") as client,
    ):
        client.import_(source, "subject")
        (path,) = (Path(folder) / "state/store").rglob("model.safetensors")  # the very file that all of them load
        rows = measured(client, path, options.runs, options.how, options.peers)
    device = device_of("auto")
    is_all = options.how == ["cold", "warm"] and options.peers == list(PEERS)
    chosen = "" if is_all else f" --how {','.join(options.how)} --peers {','.join(options.peers)}"
    made = report(
        "peers" if is_all else "race",
        f"tests/bench/peers.py {source.name} --runs {options.runs}{chosen} ({source.stat().st_size / 1e9:.1f} GB)",
        rows,
        driver=device.kind.value if device else "host",
        gpu=device.gpu if device else None,
    )
    if options.json:
        options.json.write_text(made.to_json() + "\n")
    for row in made.rows:
        print(f"{row.name:32s} {row.value:8.2f} {row.unit:5s} limit {row.limit or 0:8.2f} ratio {row.ratio or 0:6.3f}")


def _names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"not {', '.join(unknown)}: one or more of {', '.join(known)}")
        return names

    return parse


def measured(client: flashd.Client, path: Path, runs: int, hows: Collection[str], peers: Collection[str]) -> list[Row]:
    with path.open("rb") as file:
        found = header.read(file.fileno(), str(path))
    size_bytes = found.data_bytes
    aligned_bytes = size_bytes // ALIGNMENT * ALIGNMENT
    device = device_of("auto")
    tier = "device" if device else "host"
    figures: defaultdict[str, list[float]] = defaultdict(list)

    def note(name: str, seconds: float | None) -> None:
        if seconds:
            figures[name].append(size_bytes / seconds / 1e9)

    def ours(how: str) -> None:
        client.evict("subject")
        prepare(str(path), how)
        started = time.perf_counter()
        client.load("subject", tier)
        with client.lease("subject", device=tier) as lease:
            assert lease.tensors()
            note(f"flashd.{how}", time.perf_counter() - started)
        client.evict("subject")

    def ours_from_host() -> None:
        client.load("subject", "host")
        time.sleep(1.0 + size_bytes / 8e9)  # until the driver's figures follow
        started = time.perf_counter()
        client.load("subject", "device")
        with client.lease("subject", device="device") as lease:
            assert lease.tensors()
            note("flashd.host", time.perf_counter() - started)
        client.evict("subject")

    def peer(name: str, how: str) -> Callable[[], None]:
        return lambda: note(f"{name}.{how}", seconds_of(name, path, how))

    def limits() -> None:
        with Ready(size_bytes, device) as ready:
            prepare(str(path), "cold")
            note("raw", raw_read(
                str(path), offset=found.data_offset, address=ready.address, size_bytes=aligned_bytes,
                block_bytes=8 * MiB, depth=12,
            ))  # fmt: skip
            if device:
                with Link(device, size_bytes) as link:
                    link.copy(ready.address, size_bytes)
                    note("copy", link.copy(ready.address, size_bytes))

    steps: list[Callable[[], None]] = [limits, *(functools.partial(ours, how) for how in hows)]
    steps += [ours_from_host] if device and "warm" in hows else []
    steps += [peer(name, how) for name in peers for how in hows]
    ours("cold")  # staging memory is made, contexts too
    figures.clear()
    for _ in range(runs):
        random.shuffle(steps)
        for step in steps:
            step()
    rows = [rate_row("limit.raw_read", figures["raw"], "GB/s")]
    rows += [rate_row("limit.pinned_copy", figures["copy"], "GB/s")] if device else []
    for name in ("flashd", *PEERS):
        for how, limit in (("cold", "raw"), ("warm", "copy"), ("host", "copy")):
            if figures[f"{name}.{how}"]:
                rows.append(rate_row(f"peer.{name}.{how}", figures[f"{name}.{how}"], "GB/s", figures[limit]))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
