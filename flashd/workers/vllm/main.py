# SPDX-License-Identifier: Apache-2.0
"""Imports vLLM once, which takes half a minute, so that no engine pays for it.

    python -m flashd.workers.vllm.main CONTROL_FD FOLDER

No GPU is touched: a process that has initialised CUDA cannot be forked.
"""

from __future__ import annotations

import gc
import sys


def main() -> None:
    gc.disable()  # until the forks: imports free nothing, and collections would take a fifth of their time
    from flashd.workers import zygote
    from flashd.workers.vllm import compat, worker

    compat.preload()
    zygote.serve(sys.argv, worker.main, compat.build())


if __name__ == "__main__":
    main()
