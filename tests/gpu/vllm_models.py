# SPDX-License-Identifier: Apache-2.0
"""What does vLLM answer by itself, on this GPU? Run as a program it prints the token ids of greedy answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPTS = ["Hello, who are you?", "I am", "I am Ada, the first model you dropped into the folder. " * 12]


def answers_of_plain_vllm(models: Sequence[Path], **arguments: Any) -> dict[str, list[list[int]]]:
    """By model's name. One process a model, at once: vLLM gives its memory back only when it ends."""
    # The share of the card only says how much must be free, as long as the KV cache has a size.
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 256 << 20, "gpu_memory_utilization": 0.1, "seed": 0}

    def answers(model: Path) -> list[list[int]]:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps({"model": str(model), **options, **arguments})],
            capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
        assert lines, done.stderr[-4000:]
        found: list[list[int]] = json.loads(lines[0].removeprefix("ANSWERS "))
        return found

    with ThreadPoolExecutor() as pool:
        return dict(zip([model.name for model in models], pool.map(answers, models), strict=True))


def main() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(max_num_seqs=32, **json.loads(sys.argv[1]))
    greedy = SamplingParams(temperature=0, max_tokens=16, seed=0)
    found = [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, greedy, use_tqdm=False)]
    print("ANSWERS " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
