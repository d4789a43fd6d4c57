# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of plain vLLM, as token ids: a program for vllm_forks.py.

Its argument is a JSON table of arguments of vllm.LLM. It prints a JSON list with the token ids of each prompt's answer,
or the error as a text. vLLM is loaded in its own way and not in the engine's.
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


def engine(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    from flashd.workers.vllm import compat

    compat.fork_processes()  # neither changes an answer: processes need not import vLLM again ...
    compat.nap_between_steps()  # ... and do not keep a core busy while they wait
    return LLM(max_model_len=256, kv_cache_memory_bytes=64 << 20, enforce_eager=True, seed=0, **arguments)


def answers(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=16)
    return [list(found.outputs[0].token_ids) for found in llm.generate(PROMPTS, greedy, use_tqdm=False)]


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    arguments = json.loads(sys.argv[1])
    try:
        llm = engine(arguments)
        found: Any = answers(llm)
        if "tensor_parallel_size" in arguments:
            del llm  # ends its ranks; alone it is left to the end of this process, because its own takes a second
    except BaseException as error:  # noqa: BLE001 -- reported as the outcome
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    print(json.dumps(found), flush=True)
    os._exit(0)  # without vLLM's own end, which may wait for what a fork does not have
