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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from flashd.checkpoint import header, pickles, trainers
from flashd.checkpoint.pickles import SourceTensor, Table
from flashd.errors import InvalidSource, TransferFailed
from flashd.streamer import Extent, OpenFile
from flashd.units import MiB, format_bytes

# What engines read beside the weights. An allow-list: code (.py) and training state are never stored.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer*.model",
    "*.tiktoken", "spiece.model", "sentencepiece*.model", "spm*.model", "source.spm", "target.spm", "bpe.codes",
    "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "quantize_config.json", "quantization_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json", "tekken.json", "params.json",
)  # fmt: skip
MAX_SIDE_FILE_BYTES = 64 * MiB
MAX_ENTRIES = 10_000  # of a folder
MAX_FILES = 500  # of a source; the largest models in use have 200, and each costs a descriptor

PICKLES = ("*.bin", "*.pt", "*.pth")
WEIGHTS = ("*.safetensors", *PICKLES)
NOT_WEIGHTS = (*trainers.NOT_WEIGHTS, "*.index.json", "consolidated*", "adapter_model*")
_CONSOLIDATED = ("consolidated*.safetensors", "consolidated*.pth")  # as their makers publish Llama and Mistral
_GGUF = ("*.gguf",)  # not ours to read, but worth a word
ADAPTER = "adapter_config.json"  # as PEFT saves fine-tunes that only add to a base
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)")


@dataclass(frozen=True, slots=True)
class Convention:
    """How transformers names weights: one file, or an index and its shards."""

    single: str
    index: str
    patterns: tuple[str, ...]


# In the order in which transformers looks for them.
CONVENTIONS = (
    Convention("model.safetensors", "model.safetensors.index.json", ("*.safetensors",)),
    Convention("pytorch_model.bin", "pytorch_model.bin.index.json", PICKLES),
)

Index = Mapping[str, str]  # tensor → file


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors by name, where their bytes are in `files`, and the small files beside them.

    `made` is what `close` closes: files that are not those of the source.
    """

    files: tuple[OpenFile, ...]
    tensors: tuple[SourceTensor, ...]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    side_files: Mapping[str, OpenFile]
    made: ExitStack

    @property
    def size_bytes(self) -> int:
        return sum(tensor.extent.length for tensor in self.tensors)

    def close(self) -> None:
        self.made.close()


class SourceFiles:
    """The regular files of a source by their name; closes them at the end of its context.

    Of a folder only what will be used is opened: not the pickles beside safetensors, nor an optimizer's state.
    """

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
        files = cls({})
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidSource(f"{path} cannot be read: {error.strerror}") from None
        try:
            names = _bounded_listing(folder, path)

            def open_index(name: str) -> Index:
                files._files[name] = _open(folder, path / name)
                return _read_index(files._files[name], name)

            weights, _ = _choose(names, open_index)
            if not weights:
                trainers.check_whole(names)
                _check_not_gguf(names)  # which would not be opened
            side_files = [name for name in names if matches(name, (*SIDE_FILES, ADAPTER))]
            for name in _checked_names([*weights, *side_files]):
                if name in names and name not in files:
                    files._files[name] = _open(folder, path / name)
        except BaseException:
            files.close()
            raise
        finally:
            os.close(folder)
        return files

    @classmethod
    def from_fds(cls, fds: Mapping[str, int]) -> Self:
        """Descriptors that somebody sent us; they become ours. Names are those within the source."""
        files = cls({name: OpenFile(fd, name) for name, fd in fds.items()})
        try:
            for name in _checked_names(list(fds)):
                file = files[name]
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
        return [name for name in sorted(self._files) if matches(name, patterns)]

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
    side_files = {name: files[name] for name in files.matching(SIDE_FILES)}
    for file in side_files.values():
        _check_size(file, MAX_SIDE_FILE_BYTES)
    tables: dict[str, Table] = {}
    metadata: dict[str, str] = {}
    for number, name in enumerate(names):
        if not matches(name, PICKLES):
            found = header.read(opened[number].fd, opened[number].path)
            tables[name] = _table(found, number, opened[number].path)
            metadata = {**found.metadata, **metadata}
    metadata.pop(header.ALIASES, None)
    with ExitStack() as made:
        if numbers := [number for number, name in enumerate(names) if name not in tables]:
            unpacked, spill = converter.tables(opened, numbers)
            tables |= {names[number]: _unwrapped(table) for number, table in zip(numbers, unpacked, strict=True)}
            if spill is not None:
                made.callback(os.close, spill.fd)
                opened.append(spill)
        tensors, aliases = _merged(tables, index)
        if matches(names[0], ("*.pth",)):
            trainers.check_names([tensor.name for tensor in tensors], names[0])
        return Source(tuple(opened), tensors, aliases, metadata, side_files, made.pop_all())


def is_adapter(files: SourceFiles) -> bool:
    """Whether this is no whole model, but an adapter to one."""
    names, _ = _choose(list(files), lambda name: _read_index(files[name], name))
    return ADAPTER in files and set(names) <= set(_ADAPTER_WEIGHTS)


def _table(found: header.Header, number: int, path: str) -> Table:
    """The tensors of a safetensors file in offsets of the file."""
    tensors = tuple(
        SourceTensor(t.name, t.dtype, t.shape, number, Extent(found.data_offset + t.extent.offset, t.extent.length))
        for t in found.tensors
    )
    return Table(tensors, header.aliases(found, path))


def _unwrapped(table: Table) -> Table:
    """A state dict under the names of the model, though a wrapper of it was saved."""
    wrapper = trainers.wrapper_of([*(tensor.name for tensor in table.tensors), *table.aliases])
    if not wrapper:
        return table
    tensors = tuple(replace(tensor, name=tensor.name.removeprefix(wrapper)) for tensor in table.tensors)
    plain = {alias.removeprefix(wrapper): name.removeprefix(wrapper) for alias, name in table.aliases.items()}
    return Table(tensors, plain)


def _merged(tables: Mapping[str, Table], index: Index) -> tuple[tuple[SourceTensor, ...], Mapping[str, str]]:
    tensors: list[SourceTensor] = []
    aliases: dict[str, str] = {}
    held_by: dict[str, str] = {}
    for file, table in tables.items():
        for name in (*(tensor.name for tensor in table.tensors), *table.aliases):
            if name in held_by:
                hint = "drop only one of them, or a folder with an index"
                raise InvalidSource(f"tensor {name!r} is both in {held_by[name]} and in {file}", hint=hint)
            held_by[name] = file
        tensors += table.tensors
        aliases |= table.aliases
    for name, shard in index.items():
        if held_by.get(name) != shard:
            raise InvalidSource(f"the index says that {name!r} is in {shard}, and it is not")
    if not tensors:
        raise InvalidSource("the weights hold no tensors")
    return tuple(tensors), aliases


def missing_shards(path: Path) -> list[str]:
    """Shards that a folder still waits for: named by its index, or by the numbering of those that are there.

    Raises InvalidSource for an index that makes no sense.
    """
    try:
        names = set(_listing(path))
    except NotADirectoryError:
        return []

    def open_index(name: str) -> Index:
        file = _open(None, path / name)
        try:
            return _read_index(file, name)
        finally:
            os.close(file.fd)

    weights, _ = _choose(names, open_index)
    return sorted(set(weights) - names)


def has_weights(path: Path) -> bool:
    """Whether a folder or a file looks like a source at all, if only to be told why it is none."""
    if not path.is_dir():
        return _is_weights(path.name) or matches(path.name, _GGUF)
    telling = {convention.index for convention in CONVENTIONS} | {ADAPTER}
    names = _listing(path)
    known = (*_CONSOLIDATED, *_GGUF)
    are_weights = any(_is_weights(name) or name in telling or matches(name, known) for name in names)
    return are_weights or trainers.are_shards(names)


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


def _checked_names(names: list[str]) -> list[str]:
    """Names of files within a folder that may stand in a message, a manifest and a terminal."""
    if len(names) > MAX_FILES:
        raise InvalidSource(f"there are {len(names)} files, and at most {MAX_FILES} make sense")
    for name in names:
        if "/" in name or not name.isprintable() or name in {"", ".", ".."}:
            raise InvalidSource(f"{name!r} is not the name of a file", hint="use the files of one folder, by name")
    return names


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_weights(name: str) -> bool:
    return matches(name, WEIGHTS) and not matches(name, NOT_WEIGHTS)


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


def _choose(names: Collection[str], read_index: Callable[[str], Index]) -> tuple[list[str], Index]:
    """Which files are the weights, among those there are, and what their index says. Some may not be there yet."""
    for convention in CONVENTIONS:
        index = read_index(convention.index) if convention.index in names else {}
        shards = set(index.values())
        if convention.single in names and convention.single not in shards:
            return [convention.single], {}  # an index beside it was left by an earlier save
        if shards:
            return sorted(shards), index
        found = {n for n in names if matches(n, convention.patterns) and not matches(n, NOT_WEIGHTS)}
        if found := trainers.latest_epoch(found):
            return sorted(found | _numbered(found)), {}
    for pattern in _CONSOLIDATED:
        if found := {name for name in names if matches(name, (pattern,))}:
            return sorted(found), {}
    if ADAPTER in names:
        return [next((name for name in _ADAPTER_WEIGHTS if name in names), _ADAPTER_WEIGHTS[0])], {}
    return [], {}


def _numbered(names: Collection[str]) -> set[str]:
    """All shards of the series that some belong to: model-00002-of-00003.safetensors is one of three."""
    series = {(match[1], match[3], match[4]) for name in names if (match := _SHARD.fullmatch(name))}
    if sum(int(count) for _, count, _ in series) > MAX_FILES:
        raise InvalidSource(f"the names of the shards speak of more than {MAX_FILES} files")
    return {
        f"{prefix}{number:05d}-of-{count}{suffix}"
        for prefix, count, suffix in series
        for number in range(1, int(count) + 1)
    }


def needed_files(names: Collection[str], read_index: Callable[[str], Index]) -> tuple[list[str], list[str]]:
    """Of a folder's files, the weights and all others that a source needs. Raises InvalidSource if it is none."""
    indexes: list[str] = []

    def note_index(name: str) -> Index:
        indexes.append(name)
        return read_index(name)

    weights, _ = _checked_choice(names, note_index)
    others = [name for name in sorted(names) if matches(name, (*SIDE_FILES, ADAPTER))]
    _checked_names([*weights, *indexes, *others])
    return weights, [*indexes, *others]


def _weights(files: SourceFiles) -> tuple[list[str], Index]:
    """The files of weights, all of them there, and what an index says of them."""
    return _checked_choice(list(files), lambda name: _read_index(files[name], name))


def _checked_choice(names: Collection[str], read_index: Callable[[str], Index]) -> tuple[list[str], Index]:
    """As `_choose`; raises InvalidSource if there are no weights or not all of them are there."""
    weights, index = _choose(names, read_index)
    if missing := sorted(set(weights) - set(names)):
        what = f"{len(missing)} files of weights are missing, the first is {missing[0]}"
        raise InvalidSource(what, hint="finish the download, or copy the missing files")
    if weights:
        return weights, index
    _check_not_gguf(names)
    hint = "a source has *.safetensors, or PyTorch's *.bin, *.pt or *.pth"
    raise InvalidSource("there are no weights here", hint=hint)


def _check_not_gguf(names: Collection[str]) -> None:
    if any(matches(name, _GGUF) for name in names):
        hint = "take the same model as safetensors, as its maker publishes it: flash pull OWNER/NAME"
        raise InvalidSource("GGUF files are made for llama.cpp, and no engine here can read them", hint=hint)


def _read_index(file: OpenFile, name: str) -> Index:
    return parse_index(read_whole(file, header.MAX_HEADER_BYTES), name)


def parse_index(raw: bytes, name: str) -> Index:
    """Tensor → file, of an index that nobody vouches for: every file must be one of weights in the same folder."""
    document = header.strict_json(raw, name)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidSource(f"{name} has no weight_map from tensors to files")
    for tensor in weight_map:
        header.check_name(tensor, name)
    for shard in set(weight_map.values()):
        if "/" in shard or not shard.isprintable() or not matches(shard, WEIGHTS):
            raise InvalidSource(f"{name} names {shard[:80]!r}, which is not a file of weights in the same folder")
    return weight_map


def read_whole(file: OpenFile, limit_bytes: int = MAX_SIDE_FILE_BYTES) -> bytes:
    """A small file. Raises InvalidSource for one that is not, TransferFailed if it cannot be read."""
    try:
        return os.pread(file.fd, _check_size(file, limit_bytes), 0)
    except OSError as error:
        raise TransferFailed(f"read {file.path}: {error.strerror}") from None


def _check_size(file: OpenFile, limit_bytes: int) -> int:
    size_bytes = os.fstat(file.fd).st_size
    if size_bytes > limit_bytes:
        sizes = f"{format_bytes(size_bytes)}; at most {format_bytes(limit_bytes)} make sense"
        raise InvalidSource(f"{file.path} is {sizes}")
    return size_bytes
