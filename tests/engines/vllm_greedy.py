# SPDX-License-Identifier: Apache-2.0
"""What does plain vLLM answer? Token ids of greedy answers, for each of some ways to load a model.

    VLLM_PYTHON tests/engines/vllm_greedy.py JOBS_JSON     prints a JSON list of lists of token ids, one a job

Each job is a table of arguments of vllm.LLM, run in a fork of a process that has imported vLLM, in this process's way
and not in the engine's: what comes out is vLLM's own. A job that fails gives its error as a text.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

PROMPTS = [
    "Hello, who are you?",
    "I am",
    # Longer than a block of the prefix cache, which is 128 tokens on a processor.
    "I am Ada, the first model you dropped into the folder. " * 12,
]


def answers(arguments: dict[str, Any]) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(max_model_len=256, kv_cache_memory_bytes=64 << 20, enforce_eager=True, seed=0, **arguments)
    greedy = SamplingParams(temperature=0, max_tokens=16)
    return [list(found.outputs[0].token_ids) for found in llm.generate(PROMPTS, greedy, use_tqdm=False)]


def in_fork(arguments: dict[str, Any]) -> Any:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            found: Any = answers(arguments)
        except BaseException as error:  # noqa: BLE001 -- reported as the job's outcome
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        raw = answer.read()
    os.waitpid(pid, 0)
    return json.loads(raw) if raw else "died"


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from flashd.workers.vllm import compat

    compat.fork_processes()  # only so that looking at a model's class does not import vLLM again
    print(json.dumps([in_fork(job) for job in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
