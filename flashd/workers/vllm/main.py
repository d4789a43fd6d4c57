# SPDX-License-Identifier: Apache-2.0
"""Imports vLLM once, which takes half a minute, so that no engine pays for it.

    python -m flashd.workers.vllm.main CONTROL_FD FOLDER

No GPU is touched: a process that has initialised CUDA cannot be forked.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping

from flashd.workers import zygote


def prepare() -> tuple[zygote.Work, Mapping[str, str]]:
    """Imports what engines need. Returns their work, and the modules whose versions matter to them."""
    gc.disable()  # until the forks: imports free nothing, and collections would take a fifth of their time
    from flashd.workers.vllm import compat, worker

    compat.preload()
    return worker.main, compat.build()


def main() -> None:
    zygote.serve(sys.argv, *prepare())


if __name__ == "__main__":
    main()
