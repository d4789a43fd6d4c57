# SPDX-License-Identifier: Apache-2.0
"""The cost on a GPU of applying an adapter at every load, instead of loading a merged checkpoint.

    python tests/bench/apply_adapters.py [--layers 36] [--runs 7]

Needs torch and a GPU, and nothing of flashd. Qwen3-8B's shapes in bf16, in one allocation as an arena is, rank 16.
`copy_and_apply` is what a load from a resident base would be: a copy beside it, to which the product of the factors is
added, in float32 as the merge is. `from_host` is what it would replace: the merged checkpoint from pinned memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

HIDDEN, INNER, KEYS, TOKENS, RANK = 4096, 12288, 1024, 151_936, 16
PARTS = {
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (KEYS, HIDDEN), "v_proj": (KEYS, HIDDEN), "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER),
}  # fmt: skip
ADAPTERS = {"attention": ("q_proj", "v_proj"), "all_linear": tuple(PARTS)}


def seconds(do: Callable[[], object], runs: int) -> float:
    found = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        do()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    shapes = [(part, *shape) for _ in range(options.layers) for part, shape in PARTS.items()]
    elements = sum(rows * columns for _, rows, columns in shapes) + 2 * TOKENS * HIDDEN
    base = torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    copy = torch.empty_like(base)
    found = {"device": torch.cuda.get_device_name(), "bytes": base.nbytes, "copy": seconds(lambda: copy.copy_(base), 7)}
    for kind, parts in ADAPTERS.items():
        pairs = []
        offset = 0
        for part, rows, columns in shapes:
            if part in parts:
                view = copy[offset : offset + rows * columns].view(rows, columns)
                pairs.append((view, torch.randn(rows, RANK, device="cuda"), torch.randn(RANK, columns, device="cuda")))
            offset += rows * columns

        def copy_and_apply(pairs: list[tuple[torch.Tensor, ...]] = pairs) -> None:
            copy.copy_(base)
            for weight, b, a in pairs:
                weight.copy_(torch.addmm(weight.float(), b, a, alpha=2.0))

        found[f"copy_and_apply.{kind}"] = seconds(copy_and_apply, options.runs)
    host = torch.empty(base.shape, dtype=base.dtype, pin_memory=True)
    found["from_host"] = seconds(lambda: copy.copy_(host, non_blocking=True), options.runs)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
