# SPDX-License-Identifier: Apache-2.0
"""The interpreter that has vLLM, with vLLM imported, as tests run programs in it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashd.config.environment import child_environment
from flashd.engines.vllm_factory import environment

_FORKS = Path(__file__).with_name("vllm_forks.py")


def version(python: str) -> str:
    """Returns the version and build of vLLM there, without importing it."""
    ask = "import importlib.metadata; print(importlib.metadata.version('vllm'))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


class VllmPython:
    """Runs each program in a fork of one process, which is started for the first."""

    def __init__(self, python: str, compiled: Path, folder: Path) -> None:
        """`compiled` is vLLM's cache; programs run in `folder`."""
        self._python = python
        self._environment = child_environment(environment(compiled))
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._runs = 0

    def run(self, code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """As `python -c CODE ARGUMENTS`."""
        self._runs += 1
        out, err = (self._folder / f"{self._runs}.{name}" for name in ("out", "err"))
        program = {"code": code, "arguments": list(map(str, arguments)), "out": str(out), "err": str(err)}
        status = int(self._asked(json.dumps(program)))
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    def answers(self, jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Returns plain vLLM's greedy answers for each job, a table of arguments of vllm.LLM (vllm_greedy.py)."""
        found = []
        for job in jobs:
            done = self.run("import vllm_greedy; vllm_greedy.main()", json.dumps(job))
            assert done.returncode == 0 and done.stdout, done.stderr
            found.append(json.loads(done.stdout.splitlines()[-1]))
        return found

    def version(self) -> str:
        return version(self._python)

    def _asked(self, line: str) -> str:
        if self._process is None:
            with (self._folder / "log").open("w") as log:
                self._process = subprocess.Popen(
                    [self._python, _FORKS], cwd=self._folder, env=self._environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, (self._folder / "log").read_text()
        return answer

    def end(self) -> None:
        if self._process is not None:
            with self._process:
                assert self._process.stdin is not None
                self._process.stdin.close()


@contextmanager
def running(python: str, compiled: Path, folder: Path) -> Iterator[VllmPython]:
    made = VllmPython(python, compiled, folder)
    try:
        yield made
    finally:
        made.end()
