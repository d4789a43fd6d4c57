# SPDX-License-Identifier: Apache-2.0
"""The compiled streamer (native/module.cpp). Sizes and offsets in bytes; only flashd/streamer.py speaks to it."""

from collections.abc import Sequence
from enum import Enum

class Error(Exception):
    """args: kind (system, memory, truncated, corrupt, cancelled, device), operation, errno, path, offset or None."""

class Backend(Enum):
    AUTO = ...
    IO_URING = ...
    THREADS = ...

class Options:
    def __init__(
        self,
        block: int,
        depth: int,
        backend: Backend,
        direct: bool,
        populate_threads: int,
        digest_threads: int,
        copy_threads: int,
        piece: int,
        pieces: int,
        page_cache: bool,
    ) -> None: ...

class Result:
    size: int
    seconds: float
    cpu_seconds: float
    populate_cpu_seconds: float
    digest_cpu_seconds: float
    backend: Backend
    direct: bool
    fixed_files: bool
    fixed_buffers: bool
    block: int
    depth: int
    staging: int
    fallback: str
    digests: bytes

class Transfer:
    total: int
    done: int
    finished: bool
    def cancel(self) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def outcome(self) -> Result: ...

def load(
    files: Sequence[tuple[int, str]],
    reads: Sequence[tuple[int, int, int, int]],
    address: int,
    size: int,
    digest_block: int,
    digests: bytes,
    populate: bool,
    options: Options,
) -> Transfer: ...
def verify(
    file: tuple[int, str], start: int, length: int, digest_block: int, digests: bytes, options: Options
) -> Transfer: ...
def write(target: tuple[int, str], offset: int, address: int, size: int, options: Options) -> Transfer: ...
def copy(
    files: Sequence[tuple[int, str]],
    pieces: Sequence[tuple[int, int, int, int]],
    target: tuple[int, str],
    region: int,
    digest_block: int,
    options: Options,
    file_size: int,
) -> Transfer: ...

class Staging:
    block: int
    size: int
    peak: int

def staging(driver: str, context: int, block: int, count: int) -> Staging: ...
def load_device(
    file: tuple[int, str],
    start: int,
    length: int,
    target: int,
    digest_block: int,
    digests: bytes,
    staging: Staging,
    options: Options,
) -> Transfer: ...
def write_device(
    target: tuple[int, str], offset: int, source: int, length: int, staging: Staging, options: Options
) -> Transfer: ...
def upload(address: int, size: int, target: int, registered: bool, staging: Staging, options: Options) -> Transfer: ...
def download(
    source: int, address: int, size: int, registered: bool, staging: Staging, options: Options
) -> Transfer: ...
def raw_read(path: str, offset: int, address: int, size: int, block: int, depth: int) -> float: ...
def blake3(data: bytes) -> bytes: ...
