# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's llama-server for tests: built once from the sources that `flash engine install llama.cpp` builds.

The build takes seven minutes of a processor, with the lowest priority, and is kept outside the checkout.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import kept
from waiting import until

from flashd.cli import llama_source
from flashd.cli.wheels import Supply

# Compiled quickly rather than well, and for all processors that run the tests.
_QUICKLY = (
    *("-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG", "-DCMAKE_C_FLAGS_RELEASE=-O1 -DNDEBUG"),
    *("-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF"),
)


def program() -> Path:
    """The path of llama-server."""
    recipe = (llama_source.SHA256, repr(llama_source.OPTIONS), *_QUICKLY)
    return kept.folder("llama-server", *recipe, make=_made_aside) / llama_source.PROGRAM


def _made_aside(folder: Path) -> None:
    """Builds in a process of its own, which gives way to the tests that run meanwhile."""
    subprocess.run(["nice", "-n", "19", sys.executable, __file__, folder], check=True)


def _make(folder: Path) -> None:
    work = folder / "work"
    work.mkdir()
    built = llama_source.build(llama_source.fetch(work, Supply()), work, _QUICKLY)
    built.rename(folder / llama_source.PROGRAM)
    subprocess.run(["rm", "-rf", work], check=True)


@contextlib.contextmanager
def alone(model: Path, folder: Path, *arguments: str) -> Iterator[httpx.Client]:
    """A llama-server run by hand with a file."""
    address = folder / "alone.sock"
    command = [program(), "--model", model, "--host", address, "--threads", "1", *arguments]
    with (folder / "alone.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "LLAMA_CACHE": str(folder)})
    transport = httpx.HTTPTransport(uds=str(address))
    with httpx.Client(transport=transport, base_url="http://llama", timeout=60) as client:

        def is_ready() -> bool:
            assert process.poll() is None, (folder / "alone.log").read_text()
            with contextlib.suppress(httpx.TransportError):
                return client.get("/health").status_code == 200
            return False

        try:
            until(is_ready)
            yield client
        finally:
            process.kill()
            process.wait()
            address.unlink(missing_ok=True)


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
