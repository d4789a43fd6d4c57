# SPDX-License-Identifier: Apache-2.0
"""Compares the streamer's settings on this machine; its defaults were found in this way.

    tests/bench/sweep.py CHECKPOINT [--runs 5] [--device auto|sim:0]

Loads one safetensors file, or a checkpoint's folder, to the device: from the disk at several depths of its queue,
beside the barest read; and from a copy of it in memory by several numbers of threads and sizes of pieces, beside one
copy of pinned memory. All of it in random order, round after round; prints medians and their fraction of the limit.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

from flashd.bench.copying import Link, device_of
from flashd.bench.stream import Ready, in_memory, subject_of
from flashd.io.streamer import OpenFile, Options, load_device, raw_read
from flashd.units import KiB, MiB

DEPTHS = (8, 12, 16, 24)
THREADS = (8, 12, 16)
PIECES = ((512 * KiB, 4), (1 * MiB, 2), (1 * MiB, 4), (2 * MiB, 2), (2 * MiB, 4))
VERIFIED = (16, 1 * MiB, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = device_of(options.device)
    if device is None:
        parser.error("there is no GPU here: try --device sim:0")
    subject = subject_of(options.checkpoint)
    size_bytes = subject.extent.length
    figures: defaultdict[str, list[float]] = defaultdict(list)
    with (
        subject.path.open("rb") as file,
        Ready(size_bytes, device) as ready,
        Link(device, size_bytes) as link,
        in_memory(subject) as ram_file,
    ):
        disk = OpenFile(file.fileno(), str(subject.path))

        def raw() -> None:
            part = subject.aligned
            seconds = raw_read(
                str(subject.path), offset=part.offset, address=ready.address, size_bytes=part.length,
                block_bytes=8 * MiB, depth=12,
            )  # fmt: skip
            figures["raw"].append(part.length / seconds / 1e9)

        def copy() -> None:
            figures["copy"].append(size_bytes / link.copy(ready.address, size_bytes) / 1e9)

        def load(name: str, source: OpenFile, options: Options, *, is_verified: bool = False) -> Callable[[], None]:
            def step() -> None:
                with load_device(
                    source, subject.extent, target=link.arena.address, staging=link.staging, options=options,
                    digests=subject.digests if is_verified else None,
                ) as transfer:  # fmt: skip
                    figures[name].append(transfer.wait().gb_per_s)

            return step

        cold = [raw, *(load(f"disk, depth {depth}", disk, Options(depth=depth, page_cache=False)) for depth in DEPTHS)]
        warm = [copy]
        for threads in THREADS if ram_file else ():
            for piece_bytes, pieces in PIECES:
                found = Options(copy_threads=threads, piece_bytes=piece_bytes, pieces=pieces)
                name = f"memory, {threads} threads, {pieces} x {piece_bytes // KiB} KiB"
                assert ram_file is not None
                warm.append(load(name, ram_file, found))
                if subject.digests and (threads, piece_bytes, pieces) == VERIFIED:
                    warm.append(load(f"{name}, verified", ram_file, found, is_verified=True))
        for round_number in range(options.runs + 1):
            if round_number == 1:
                figures.clear()  # memory is touched, contexts are made
            for steps in (cold, warm, warm):  # short runs are done twice
                for step in random.sample(steps, len(steps)):
                    step()
    for name, rates in sorted(figures.items(), key=lambda entry: -median(entry[1])):
        limit = median(figures["copy" if name.startswith(("memory", "copy")) else "raw"])
        print(
            f"{name:44s} {median(rates):7.2f} GB/s {median(rates) / limit:6.3f}  {min(rates):.1f} to {max(rates):.1f}"
        )


if __name__ == "__main__":
    main()
