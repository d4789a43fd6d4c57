# SPDX-License-Identifier: Apache-2.0
"""What is imported once, so that no vLLM engine pays for it? vLLM, which takes half a minute.

    python -m flashd.engines.vllm.zygote CONTROL_FD FOLDER

No GPU is touched: a process that has initialised CUDA cannot be forked.
"""

from __future__ import annotations

import sys

from flashd.engines import forking
from flashd.engines.vllm import versions, worker


def main() -> None:
    versions.preload()
    forking.serve(sys.argv, worker.main, versions.build())


if __name__ == "__main__":
    main()
