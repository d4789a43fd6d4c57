# SPDX-License-Identifier: Apache-2.0
"""The zygote of llama.cpp engines: imports the HTTP server once, so that every engine process starts in milliseconds.

python -m flashd.workers.llama.main CONTROL_FD FOLDER
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping

from flashd.workers import zygote


def prepare() -> tuple[zygote.Work, Mapping[str, str]]:
    """Imports what engines need. Returns their work; which llama-server they run, each decides when it starts."""
    gc.disable()  # until the forks: imports free nothing
    from flashd.workers.llama import worker

    return worker.main, {}


def main() -> None:
    zygote.serve(sys.argv, *prepare())


if __name__ == "__main__":
    main()
