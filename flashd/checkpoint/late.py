# SPDX-License-Identifier: Apache-2.0
"""How does a source become a checkpoint while some of its files are still on their way?

A file that is awaited is represented by a stand-in: of the right size, empty but for its safetensors header. That is
enough to give every tensor its place. When the file itself arrives, its descriptor takes the number of the stand-in's
(dup2(2)), and whatever can be copied by then is. A file arrives whole or not at all: so whoever sends it can verify it
first, and nothing that is copied has to be taken back.
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
from flashd.checkpoint.source import SourceFiles
from flashd.errors import Cancelled, InvalidArgument, InvalidSource, TransferFailed
from flashd.streamer import OpenFile, Piece
from flashd.units import MiB

_POLL_S = 0.05
_COMPARE_BYTES = 4 * MiB


class LateFiles(SourceFiles):
    """A source, some of whose files are stand-ins until they have `arrived`, which any thread may say."""

    def __init__(self, files: Mapping[str, OpenFile], awaited: Collection[str] = ()) -> None:
        super().__init__(files)
        self._awaited = frozenset(awaited)
        self._changed = threading.Condition()
        self._is_closed = False

    @classmethod
    def expecting(cls, fds: Mapping[str, int], awaited: Collection[str]) -> Self:
        """Like `from_fds`; raises InvalidSource also for awaited names that have no stand-in."""
        files = cls.from_fds(fds)
        if unknown := set(awaited) - set(fds):
            files.close()
            raise InvalidSource(f"{min(unknown)!r} is awaited, and nothing stands in for it")
        files._awaited = frozenset(awaited)
        return files

    @property
    def awaited(self) -> frozenset[str]:
        return self._awaited

    def arrived(self, name: str, fd: int) -> None:
        """The descriptor stays the caller's. Raises InvalidSource unless the file is what its stand-in promised."""
        with self._changed:
            if self._is_closed:
                raise Cancelled("nobody waits for files any more")
            if name not in self._awaited:
                raise InvalidArgument(f"{name!r} is not awaited", hint="send each file once, when all of it is there")
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
        """What is still awaited, once that is no longer what was `seen`. Raises Cancelled."""
        with self._changed:
            while self._awaited == seen:
                if cancelled():
                    raise Cancelled("the conversion was cancelled")
                self._changed.wait(_POLL_S)
            return self._awaited

    def wait_for_headers(self, cancelled: Callable[[], bool]) -> None:
        """Until only such files are awaited whose stand-ins say what will be in them."""
        awaited = self.awaited
        while not all(map(_has_header, awaited)):
            awaited = self.wait(awaited, cancelled)

    def wait_for_all(self, cancelled: Callable[[], bool]) -> None:
        """Until every file is here."""
        awaited = self.awaited
        while awaited:
            awaited = self.wait(awaited, cancelled)

    def close(self) -> None:
        with self._changed:  # afterwards the number of a stand-in may be somebody else's
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
    """Consecutive blocks of a region, and the pieces that fill them; their offsets count from the stretch's start."""

    first_block: int
    offset: int
    pieces: tuple[Piece, ...]


def whole(pieces: Sequence[Piece]) -> Iterator[Stretch]:
    """All at once."""
    yield Stretch(0, 0, tuple(pieces))


def as_they_arrive(
    pieces: Sequence[Piece], block_bytes: int, names: Sequence[str], files: LateFiles, cancelled: Callable[[], bool]
) -> Iterator[Stretch]:
    """The blocks of a region in the order in which what they are made of arrives; `names` of the pieces' files.

    Ends when every file is here. Blocks are what is digested, so that none may be copied in two parts.
    """
    blocks = _blocks(pieces, block_bytes) or [[]]
    needs = [{names[piece.file] for piece in block} for block in blocks]
    left = list(range(len(blocks)))
    awaited = files.awaited
    while True:
        ready = [index for index in left if not needs[index] & awaited]
        left = [index for index in left if needs[index] & awaited]
        # Consecutive numbers have the same distance from their rank among all that are ready.
        for _, run in groupby(enumerate(ready), key=lambda ranked: ranked[1] - ranked[0]):
            yield _stretch(blocks, [index for _, index in run], block_bytes)
        if not awaited:
            return
        awaited = files.wait(awaited, cancelled)


def _blocks(pieces: Sequence[Piece], block_bytes: int) -> list[list[Piece]]:
    """The pieces of each block, cut where blocks begin."""
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
