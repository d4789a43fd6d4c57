# SPDX-License-Identifier: Apache-2.0
"""Runs programs in forks of a process that has imported vLLM, which alone takes ten seconds of a processor.

    VLLM_PYTHON tests/engines/vllm_forks.py     reads a program per line, as JSON, and prints its exit status

A program is {"code", "arguments", "out", "err"}: as `python -c CODE ARGUMENTS`, with its output in these files. flashd
changes vLLM's modules only when an engine starts, so here they are vLLM's own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence


def run(code: str, arguments: Sequence[str], out: str, err: str) -> int:
    """Returns the exit status; negative if a signal ended the program."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for number, path in enumerate((os.devnull, out, err)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
            sys.argv[:] = ["-c", *arguments]
            status = executed(code)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def executed(code: str) -> int:
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 -- the interpreter's own boundary
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where vLLM logs its imports
    gc.disable()  # imports free nothing
    import vllm.lora.layers
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import flashd.workers.vllm.worker  # noqa: F401

    gc.collect()
    gc.freeze()  # else vLLM, which collects several times at its start, looks at all imported objects in each fork
    gc.enable()
    for line in sys.stdin:
        print(run(**json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
