# SPDX-License-Identifier: Apache-2.0
"""Open files and mapped memory that end with their test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from native.contents import Memory

from flashd.io.streamer import OpenFile


@pytest.fixture
def memory() -> Iterator[Callable[[int], Memory]]:
    with ExitStack() as stack:

        def make(size_bytes: int) -> Memory:
            made = Memory(size_bytes)
            stack.callback(made.mapping.close)
            return made

        yield make


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., OpenFile]]:
    """Makes a file with these contents, or opens what a path names; closed when the test ends."""
    with ExitStack() as stack:

        def make(contents: bytes | None = None, *, path: Path | None = None, flags: int = os.O_RDWR) -> OpenFile:
            path = path or tmp_path / f"file-{len(list(tmp_path.iterdir()))}"
            if contents is not None:
                path.write_bytes(contents)
            fd = os.open(path, flags | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return OpenFile(fd, str(path))

        yield make
