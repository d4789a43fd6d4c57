# SPDX-License-Identifier: Apache-2.0
"""What did the user drop? A source: weights and side files, opened safely, described as one table of tensors.

Everything is opened once, without following links and without blocking, and used by descriptor from then on: nothing
outside the folder can be reached, and nothing can be swapped under our feet. Sources that reach us over D-Bus are
descriptors from the start.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from flashd.checkpoint import header, pickles
from flashd.checkpoint.pickles import SourceTensor
from flashd.errors import InvalidSource
from flashd.streamer import OpenFile
from flashd.units import MiB, format_bytes

# What engines read beside the weights. An allow-list: code (.py) and training state are never stored.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "*.tiktoken", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "quantize_config.json", "quantization_config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "tekken.json", "params.json",
)  # fmt: skip
MAX_SIDE_FILE_BYTES = 64 * MiB
MAX_ENTRIES = 10_000

SAFETENSORS = ("*.safetensors",)
PICKLES = ("*.bin", "*.pt", "*.pth")
# What trainers leave beside the weights.
NOT_WEIGHTS = (
    "training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*", "*.index.json", "consolidated*",
    "adapter_model*",
)  # fmt: skip
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)")


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors by name, where their bytes are in `files`, and the small files beside them.

    The last `spills` of the files are ours: `close` closes them.
    """

    files: tuple[OpenFile, ...]
    spills: tuple[OpenFile, ...]
    tensors: tuple[SourceTensor, ...]
    aliases: Mapping[str, str]
    side_files: Mapping[str, OpenFile]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.extent.length for tensor in self.tensors)

    def close(self) -> None:
        for spill in self.spills:
            os.close(spill.fd)


class SourceFiles:
    """The regular files of a source by their name; closes them at the end of its context."""

    def __init__(self, files: Mapping[str, OpenFile]) -> None:
        self._files = dict(files)

    @classmethod
    def from_path(cls, path: Path) -> SourceFiles:
        """A folder, or a single file of weights, not a link to one. Raises InvalidSource."""
        try:
            is_folder = stat.S_ISDIR(path.lstat().st_mode)
        except OSError as error:
            raise InvalidSource(f"{path} cannot be read: {error.strerror}") from None
        return cls.from_folder(path) if is_folder else cls({path.name: _open(None, path)})

    @classmethod
    def from_folder(cls, path: Path) -> SourceFiles:
        files: dict[str, OpenFile] = {}
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidSource(f"{path} cannot be read: {error.strerror}") from None
        try:
            for name in sorted(_bounded_listing(folder, path)):
                if _is_wanted(name):
                    files[name] = _open(folder, path / name)
        except BaseException:
            cls(files).close()
            raise
        finally:
            os.close(folder)
        return cls(files)

    @classmethod
    def from_fds(cls, fds: Mapping[str, int]) -> SourceFiles:
        """Descriptors that somebody sent us; they become ours. Names are those within the source."""
        files = cls({name: OpenFile(fd, name) for name, fd in fds.items()})
        try:
            for name, file in files._files.items():
                if "/" in name or not name.isprintable() or name in {"", ".", ".."}:
                    raise InvalidSource(
                        f"{name!r} is not the name of a file", hint="send the files of one folder, by name"
                    )
                _check_regular(os.fstat(file.fd), name)
                os.set_blocking(file.fd, True)
        except BaseException:
            files.close()
            raise
        return files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> OpenFile:
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def matching(self, patterns: tuple[str, ...]) -> list[str]:
        return [name for name in sorted(self._files) if _matches(name, patterns)]

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                os.close(file.fd)
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_source(files: SourceFiles, converter: pickles.Converter) -> Source:
    """The table of all tensors of a source. Raises InvalidSource for anything malformed, incomplete or hostile."""
    names, index = _weights(files)
    opened = [files[name] for name in names]
    try:
        tensors, aliases = _tensors(names, files, index, opened, converter)
        return Source(tuple(opened), tuple(opened[len(names) :]), tensors, aliases, _side_files(files))
    except BaseException:
        for spill in opened[len(names) :]:
            os.close(spill.fd)
        raise


def _tensors(
    names: list[str],
    files: SourceFiles,
    index: Mapping[str, str],
    opened: list[OpenFile],
    converter: pickles.Converter,
) -> tuple[tuple[SourceTensor, ...], Mapping[str, str]]:
    tensors: dict[str, SourceTensor] = {}
    aliases: dict[str, str] = {}
    held_by: dict[str, str] = {}
    for name in names:
        table = _table(files[name], opened, converter)
        for found in (*(tensor.name for tensor in table.tensors), *table.aliases):
            if found in held_by:
                raise InvalidSource(f"tensor {found!r} is both in {held_by[found]} and in {name}")
            held_by[found] = name
        tensors |= {tensor.name: tensor for tensor in table.tensors}
        aliases |= table.aliases
    for tensor_name, shard in index.items():
        if held_by.get(tensor_name) != shard:
            raise InvalidSource(f"the index says that {tensor_name!r} is in {shard}, and it is not")
    if not tensors:
        raise InvalidSource("the weights hold no tensors")
    return tuple(tensors.values()), aliases


def _table(file: OpenFile, opened: list[OpenFile], converter: pickles.Converter) -> pickles.Table:
    """The tensors of one file of weights; what a pickle had to be unpacked to is appended to `opened`."""
    if _matches(file.path.rsplit("/", 1)[-1], PICKLES):
        return converter.table(file, opened)
    found = header.read(file.fd, file.path)
    number = opened.index(file)
    tensors = tuple(
        SourceTensor(t.name, t.dtype, t.shape, number, pickles.moved(t.extent, found.data_offset))
        for t in found.tensors
    )
    return pickles.Table(tensors, {})


def missing_shards(path: Path) -> list[str]:
    """Shards that a folder still waits for: named by its index, or by the numbering of those that are there."""
    try:
        names = set(_listing(path))
    except NotADirectoryError:
        return []
    wanted: set[str] = set()
    for index in INDEXES:
        if index in names and (path / index).is_file():
            wanted |= set(_read_index((path / index).read_bytes()[: header.MAX_HEADER_BYTES], index).values())
    for name in names:
        if match := _SHARD.fullmatch(name):
            count = min(int(match[3]), MAX_ENTRIES)
            wanted |= {f"{match[1]}{number:05d}-of-{match[3]}{match[4]}" for number in range(1, count + 1)}
    return sorted(wanted - names)


def has_weights(path: Path) -> bool:
    """Whether a folder or a file looks like a source at all."""
    if not path.is_dir():
        return _matches(path.name, SAFETENSORS + PICKLES) and not _matches(path.name, NOT_WEIGHTS)
    return any(_is_weights(name) for name in _listing(path)) or any((path / index).is_file() for index in INDEXES)


def _listing(path: Path) -> list[str]:
    return os.listdir(path)  # noqa: PTH208 -- names are all we want, thousands of times


def _bounded_listing(folder: int, path: Path) -> list[str]:
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > MAX_ENTRIES:
                raise InvalidSource(f"{path} has more than {MAX_ENTRIES} entries", hint="drop one model a folder")
    return names


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_weights(name: str) -> bool:
    return _matches(name, SAFETENSORS + PICKLES) and not _matches(name, NOT_WEIGHTS)


def _is_wanted(name: str) -> bool:
    return _matches(name, SAFETENSORS + PICKLES + SIDE_FILES + INDEXES) or name == "adapter_config.json"


def _open(folder: int | None, path: Path) -> OpenFile:
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever (open(2)); regular files ignore it.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path.name, flags, dir_fd=folder) if folder is not None else os.open(path, flags)
    except OSError as error:
        if path.is_symlink():
            hint = "copy what it points to: cp -rL follows links"
            raise InvalidSource(f"{path} is a symbolic link, and links are not followed", hint=hint) from None
        raise InvalidSource(f"{path} cannot be read: {error.strerror}") from None
    try:
        _check_regular(os.fstat(fd), str(path))
    except InvalidSource:
        os.close(fd)
        raise
    return OpenFile(fd, str(path))


def _check_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidSource(f"{path} is not a regular file")


def _weights(files: SourceFiles) -> tuple[list[str], dict[str, str]]:
    """The files of weights, safetensors before pickles, and what an index says of them."""
    for index, patterns in zip(INDEXES, (SAFETENSORS, PICKLES), strict=True):
        if index in files:
            weight_map = _read_index(_read_small(files[index], header.MAX_HEADER_BYTES), index)
            missing = sorted(set(weight_map.values()) - set(files))
            if missing:
                what = f"{len(missing)} of its files are missing, the first is {missing[0]}"
                raise InvalidSource(f"{index}: {what}", hint="finish the download, or copy the missing files")
            return sorted(set(weight_map.values())), weight_map
        found = [name for name in files.matching(patterns) if not _matches(name, NOT_WEIGHTS)]
        if found:
            return found, {}
    if "adapter_config.json" in files:
        hint = "merge it into its base model first (peft: merge_and_unload) and drop the result"
        raise InvalidSource("this is a LoRA adapter, not a whole model", hint=hint)
    consolidated = files.matching(("consolidated*.safetensors",)) or files.matching(("consolidated*.pth",))
    if consolidated:
        return consolidated, {}
    hint = "a source has *.safetensors, or PyTorch's *.bin, *.pt or *.pth"
    raise InvalidSource("there are no weights here", hint=hint)


def _read_index(raw: bytes, name: str) -> dict[str, str]:
    document = header.strict_json(raw, name)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidSource(f"{name} has no weight_map from tensors to files")
    for tensor, shard in weight_map.items():
        header.check_name(tensor, name)
        if "/" in shard or shard in {"", ".", ".."} or not _matches(shard, SAFETENSORS + PICKLES):
            raise InvalidSource(f"{name} names {shard[:80]!r}, which is not a file of weights in the same folder")
    return weight_map


def _read_small(file: OpenFile, limit_bytes: int) -> bytes:
    size_bytes = os.fstat(file.fd).st_size
    if size_bytes > limit_bytes:
        raise InvalidSource(
            f"{file.path} is {format_bytes(size_bytes)}; at most {format_bytes(limit_bytes)} make sense"
        )
    return os.pread(file.fd, size_bytes, 0)


def _side_files(files: SourceFiles) -> dict[str, OpenFile]:
    found = {name: files[name] for name in files.matching(SIDE_FILES)}
    for file in found.values():
        if os.fstat(file.fd).st_size > MAX_SIDE_FILE_BYTES:
            raise InvalidSource(f"{file.path} is larger than {format_bytes(MAX_SIDE_FILE_BYTES)}")
    return found
