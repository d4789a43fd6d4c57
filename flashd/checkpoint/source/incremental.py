# SPDX-License-Identifier: Apache-2.0
"""Converts a source while some of its files are still arriving.

An awaited file is represented by a stand-in of the right size, which is empty except for its safetensors header. That
is enough to place every tensor. When the file arrives, its descriptor replaces that of the stand-in (dup2(2)), and all
blocks that are complete by then are copied. A file arrives as a whole: so the sender can verify it first, and copied
data never has to be taken back.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

from flashd.checkpoint import header
from flashd.checkpoint.source.reader import SourceFiles
from flashd.errors import Cancelled, InvalidArgument, InvalidSource, TransferFailed
from flashd.io.streamer import OpenFile, Piece
from flashd.units import MiB

_POLL_S = 0.05
_COMPARE_BYTES = 4 * MiB


class LateFiles(SourceFiles):
    """A source in which some files are stand-ins until `arrived` is called, from any thread."""

    def __init__(self, files: Mapping[str, OpenFile], awaited: Collection[str] = ()) -> None:
        super().__init__(files)
        self._awaited = frozenset(awaited)
        self._changed = threading.Condition()
        self._is_closed = False

    @classmethod
    def expecting(cls, fds: Mapping[str, int], awaited: Collection[str]) -> Self:
        """Opens like `from_fds`. Also raises InvalidSource for awaited names without a stand-in."""
        files = cls.from_fds(fds)
        if unknown := set(awaited) - set(fds):
            files.close()
            raise InvalidSource(f"{min(unknown)!r} is awaited, but has no stand-in")
        files._awaited = frozenset(awaited)
        return files

    @property
    def awaited(self) -> frozenset[str]:
        return self._awaited

    def arrived(self, name: str, fd: int) -> None:
        """Replaces a stand-in with the file. The caller closes `fd`. Raises InvalidSource if they do not match."""
        with self._changed:
            if self._is_closed:
                raise Cancelled("the conversion has ended")
            if name not in self._awaited:
                raise InvalidArgument(f"{name!r} is not awaited", hint="send each file once, when it is complete")
            standing_in = self[name]
            try:
                _check_kept_promise(standing_in, fd)
            except OSError as error:
                raise TransferFailed(f"read {name}: {error.strerror}") from None
            os.set_blocking(fd, True)
            os.dup2(fd, standing_in.fd, inheritable=False)
            self._awaited -= {name}
            self._changed.notify_all()

    def wait(self, seen: frozenset[str], cancelled: Callable[[], bool]) -> frozenset[str]:
        """Waits until the set of awaited names differs from `seen`, and returns it. Raises Cancelled."""
        with self._changed:
            while self._awaited == seen:
                if cancelled():
                    raise Cancelled("the conversion was cancelled")
                self._changed.wait(_POLL_S)
            return self._awaited

    def wait_for_headers(self, cancelled: Callable[[], bool]) -> None:
        """Waits until only files are awaited whose stand-ins have headers."""
        awaited = self.awaited
        while not all(map(_has_header, awaited)):
            awaited = self.wait(awaited, cancelled)

    def wait_for_all(self, cancelled: Callable[[], bool]) -> None:
        """Waits until all files have arrived."""
        awaited = self.awaited
        while awaited:
            awaited = self.wait(awaited, cancelled)

    def close(self) -> None:
        with self._changed:  # afterwards the number of a stand-in's descriptor may be reused
            self._is_closed = True
            super().close()


def _has_header(name: str) -> bool:
    return name.endswith(".safetensors")


def _check_kept_promise(standing_in: OpenFile, fd: int) -> None:
    what = f"{standing_in.path} is not the file that was announced"
    status, promised_bytes = os.fstat(fd), os.fstat(standing_in.fd).st_size
    if not stat.S_ISREG(status.st_mode):
        raise InvalidSource(f"{what}: it is not a regular file")
    if status.st_size != promised_bytes:
        raise InvalidSource(f"{what}: it has {status.st_size} bytes instead of {promised_bytes}")
    if not _has_header(standing_in.path):
        return
    end = header.read(standing_in.fd, standing_in.path).data_offset
    for offset in range(0, end, _COMPARE_BYTES):
        length = min(_COMPARE_BYTES, end - offset)
        if os.pread(fd, length, offset) != os.pread(standing_in.fd, length, offset):
            raise InvalidSource(f"{what}: its header differs")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive blocks of a region and the pieces that fill them, with offsets from the start of the stretch."""

    first_block: int
    offset: int
    pieces: tuple[Piece, ...]


def whole(pieces: Sequence[Piece]) -> Iterator[Stretch]:
    """Yields the whole region as one stretch."""
    yield Stretch(0, 0, tuple(pieces))


def as_they_arrive(
    pieces: Sequence[Piece], block_bytes: int, names: Sequence[str], files: LateFiles, cancelled: Callable[[], bool]
) -> Iterator[Stretch]:
    """Yields the blocks of a region as the files with their data arrive. `names` are those of the pieces' files.

    Ends when all files have arrived. A block is never copied in two parts, because it is the unit of digests.
    """
    blocks = _blocks(pieces, block_bytes) or [[]]
    needs = [{names[piece.file] for piece in block} for block in blocks]
    left = list(range(len(blocks)))
    awaited = files.awaited
    while True:
        ready = [index for index in left if not needs[index] & awaited]
        left = [index for index in left if needs[index] & awaited]
        # Consecutive numbers have the same distance from their rank among all ready ones.
        for _, run in groupby(enumerate(ready), key=lambda ranked: ranked[1] - ranked[0]):
            yield _stretch(blocks, [index for _, index in run], block_bytes)
        if not awaited:
            return
        awaited = files.wait(awaited, cancelled)


def _blocks(pieces: Sequence[Piece], block_bytes: int) -> list[list[Piece]]:
    """Returns the pieces of each block, split at block boundaries."""
    blocks: list[list[Piece]] = []
    for piece in pieces:
        done = 0
        while done < piece.length:
            target = piece.target_offset + done
            index = target // block_bytes
            length = min(piece.length - done, (index + 1) * block_bytes - target)
            if index == len(blocks):
                blocks.append([])
            blocks[index].append(Piece(piece.file, piece.source_offset + done, target, length))
            done += length
    return blocks


def _stretch(blocks: Sequence[Sequence[Piece]], indexes: Sequence[int], block_bytes: int) -> Stretch:
    start = indexes[0] * block_bytes
    return Stretch(
        indexes[0],
        start,
        tuple(
            Piece(piece.file, piece.source_offset, piece.target_offset - start, piece.length)
            for index in indexes
            for piece in blocks[index]
        ),
    )
