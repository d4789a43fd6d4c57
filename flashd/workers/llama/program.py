# SPDX-License-Identifier: Apache-2.0
"""Runs llama-server on a Unix socket, with its model in memory that another process has filled.

The model's file is /proc/self/fd/N, the arena: llama.cpp maps it like a file on disk, so nothing is read or copied, and
all processes that map it share its pages.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flashd.checkpoint.gguf.traits import Traits
from flashd.config.environment import llama_environment
from flashd.engines.messages import Tuning
from flashd.engines.process_info import lacks_memory
from flashd.errors import EngineFailed, EngineOutOfMemory, Unsupported
from flashd.io import sandbox
from flashd.units import MiB

NAME = "llama-server"
REMEDY = "flash engine install llama.cpp, or set engines.llama.server to the path of llama-server"
_USUAL_CONTEXT = 4096  # if neither the settings nor the model tell one
_POLL_S = 0.01
_ANSWER_S = 5.0
_LOG_BYTES = 4 * MiB
_MODEL_LOADED, _NOT_HERE = b" 200 ", b" 404 "
# Settings that some versions do not know, and then ignore, unlike arguments.
_ENVIRONMENT = {
    "LLAMA_ARG_NO_REPACK": "1",  # weights in another order would be a copy of them, made at each start
    "LLAMA_ARG_DEVICE": "none",  # a GPU's memory is not ours to take here
    "LLAMA_ARG_CACHE_RAM": "0",  # of prompts, in addition to the context's memory
    "LLAMA_ARG_FIT": "off",  # to the memory of GPUs, for which it would read the header twice
    "LLAMA_ARG_OFFLINE": "1",
    "GGML_NO_BACKTRACE": "1",  # by a debugger, which it would start when it aborts
}
# What llama.cpp says of a model that it cannot load, the most informative first.
_CAUSES = (
    re.compile(r"error loading model: (.+)"),
    re.compile(r"GGML_ASSERT\(.+\) failed"),
    re.compile(r"error while handling argument (.+)"),
    re.compile(r"error: (.+)"),
    re.compile(r"failed to (.+)"),
)
_UNKNOWN = "unknown model architecture"


def find(configured: str) -> str:
    """Returns the path of llama-server: the configured one, that of our environment, or one on PATH.

    Raises Unsupported if there is none.
    """
    if configured:
        if not os.access(configured, os.X_OK):
            raise Unsupported(f"engines.llama.server is {configured}, which cannot be run", hint=REMEDY)
        return configured
    installed = Path(sys.prefix) / "bin" / NAME
    found = str(installed) if os.access(installed, os.X_OK) else shutil.which(NAME)
    if not found:
        raise Unsupported("llama.cpp is not installed, which answers with GGUF models", hint=REMEDY)
    return found


def arguments(fd: int, address: str, name: str, traits: Traits, tuning: Tuning) -> Iterator[str]:
    """Yields the arguments of llama-server. The user's take precedence, except for the model and the address."""
    context = str(context_length(traits, tuning))
    yield from ("--ctx-size", context, "--threads", str(tuning.threads or len(os.sched_getaffinity(0))), "--no-warmup")
    if traits.embeds:
        # A text is read as a whole, unlike one that is answered.
        yield from (
            "--reranking" if traits.ranks else "--embeddings",
            "--batch-size",
            context,
            "--ubatch-size",
            context,
        )
    yield from tuning.arguments
    yield from ("--model", f"/proc/self/fd/{fd}", "--host", address)
    yield from ("--alias", name.partition(",")[0])  # in its answers; it takes several, with commas between


def context_length(traits: Traits, tuning: Tuning) -> int:
    """Returns the most tokens of a request and its answer."""
    known = [length for length in (tuning.context, traits.context_length) if length]
    return min(known, default=_USUAL_CONTEXT)


class Server:
    """A running llama-server. `on_death` is called in a thread if it ends before `stop`."""

    def __init__(self, command: Sequence[str], fd: int, address: str, on_death: Callable[[], None]) -> None:
        self.address = address
        self._said_before = _log_bytes()
        self._is_wanted = True
        self._on_death = on_death
        # In our process group, which our zygote ends, and ended by the kernel with the thread that starts it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=sys.stderr.fileno(),
            env=llama_environment({**_ENVIRONMENT, "LLAMA_CACHE": str(Path.cwd()), "HOME": str(Path.cwd())}),
            pass_fds=(fd,),
            preexec_fn=_end_with_us,  # noqa: PLW1509 -- it makes one system call, without locks
        )

    def wait_until_ready(self) -> None:
        """Waits until the model is loaded. Raises EngineFailed, after ending the program, if it is not."""
        try:
            while not self._answers():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_POLL_S)
                    raise self._failure()
        except BaseException:
            self.stop()
            raise
        threading.Thread(target=self._watch, daemon=True, name=NAME).start()

    def stop(self) -> None:
        """Ends the program. It has nothing to save."""
        self._is_wanted = False
        self._process.kill()
        self._process.wait()
        Path(self.address).unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def last_words(self) -> str:
        """Returns the reason for its end, in one line."""
        status = self._process.returncode
        how = f"signal {-status}" if status and status < 0 else f"status {status}"
        return _cause(self._said_before) or f"{NAME} ended with {how}"

    def _watch(self) -> None:
        self._process.wait()
        if self._is_wanted:
            self._on_death()

    def _answers(self) -> bool:
        """Tells whether the model is loaded: the program answers from its start on, and with an error until then."""
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(_ANSWER_S)
            connection.connect(self.address)
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            said = connection.recv(64)
            if _NOT_HERE in said:
                raise EngineFailed("llama.cpp answers at another path", hint="remove --api-prefix from its arguments")
            return _MODEL_LOADED in said
        return False

    def _failure(self) -> EngineFailed:
        why = self.last_words()
        if _UNKNOWN in why:
            hint = "a newer llama.cpp may know it: flash engine install llama.cpp"
            return Unsupported(f"llama.cpp: {why}", hint=hint)
        return (EngineOutOfMemory if lacks_memory(why) else EngineFailed)(f"llama.cpp: {why}")


def _end_with_us() -> None:
    sandbox.end_with_parent(signal.SIGKILL)


def _log_bytes() -> int:
    """Returns the length of the log, to which we and the program write."""
    return os.fstat(2).st_size


def _cause(since: int) -> str:
    """Returns the most informative error in the log after `since` bytes; empty if there is none."""
    with contextlib.suppress(OSError):
        lines = os.pread(2, _LOG_BYTES, since).decode(errors="replace").splitlines()
        for pattern in _CAUSES:
            for line in lines:
                if found := pattern.search(line):
                    return " ".join(found[0].removeprefix("error: ").split())[:500]
    return ""
