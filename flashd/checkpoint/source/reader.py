# SPDX-License-Identifier: Apache-2.0
"""Reads sources: opens weights and side files safely, and makes one table of tensors.

Files are opened once, without following links and without blocking, and then used only by descriptor: nothing outside
the folder can be reached, and no file can be replaced meanwhile. Sources sent over D-Bus are descriptors from the
start.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from flashd.checkpoint import header
from flashd.checkpoint.json_reader import as_utf8, read_json
from flashd.checkpoint.source import pickles, recognised, trainers, wrappers
from flashd.checkpoint.source.debris import is_debris
from flashd.checkpoint.source.pickles import SourceTensor, Table
from flashd.checkpoint.source.shards import whole_series
from flashd.closing import Closing
from flashd.errors import InvalidSource, TransferFailed
from flashd.io.streamer import Extent, OpenFile
from flashd.units import MiB, format_bytes

# Files that engines read besides the weights. An allow-list: code (.py) and training state are never stored.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer*.model",
    "*.tiktoken", "spiece.model", "sentencepiece*.model", "spm*.model", "source.spm", "target.spm", "bpe.codes",
    "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "quantize_config.json", "quantization_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_Pooling.json", "tekken.json",
    "params.json",
)  # fmt: skip
MAX_SIDE_FILE_BYTES = 64 * MiB
MAX_PARSED_BYTES = 4 * MiB  # of a JSON file that only engines read
_END_BYTES = 1024
MAX_ENTRIES = 10_000  # of a folder
MAX_FILES = 500  # of a source; the largest models in use have 200, and each costs a descriptor

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
GGUF = ("*.gguf",)
WEIGHTS = ("*.safetensors", *PICKLES, *GGUF)
NOT_WEIGHTS = (*trainers.NOT_WEIGHTS, *recognised.NOT_PICKLES, "*.index.json", "consolidated*", "adapter_model*")
_BESIDE_GGUF = ("*mmproj*.gguf", "*imatrix*.gguf")  # files that accompany a model, of which no engine here makes use
_CONSOLIDATED = ("consolidated*.safetensors", "consolidated*.pth")  # as Llama and Mistral are published by their makers
CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # as PEFT saves fine-tunes that only add to a base
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_POOLING = re.compile(r"(\d_Pooling)/config\.json")


@dataclass(frozen=True, slots=True)
class Convention:
    """A convention for naming weights: one file, or an index and its shards."""

    single: str
    index: str
    patterns: tuple[str, ...]


# In the order in which transformers looks for them, with Lightning's last.
CONVENTIONS = (
    Convention("model.safetensors", "model.safetensors.index.json", ("*.safetensors",)),
    Convention("pytorch_model.bin", "pytorch_model.bin.index.json", ("*.bin", "*.pt", "*.pth")),
    Convention("last.ckpt", "", ("*.ckpt",)),  # as Lightning names the latest
)

Index = Mapping[str, str]  # tensor → file


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors by name, with the places of their bytes in `files`, and the side files.

    `made` are files that do not belong to the source, and that `close` closes.
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


class SourceFiles(Closing):
    """The regular files of a source by name, closed at the end of the context.

    Only the needed files of a folder are opened: neither pickles beside safetensors nor an optimizer's state.
    """

    def __init__(self, files: Mapping[str, OpenFile]) -> None:
        self._files = dict(files)

    @classmethod
    def from_path(cls, path: Path, *, beneath: Path | None = None) -> SourceFiles:
        """Opens a folder, or a single file of weights, but not through a link. Raises InvalidSource.

        Links in the path from `beneath`, a folder above it, are not followed either, because other users may write
        there.
        """
        with _parent(path, beneath) as parent:
            fd = _open_at(parent, path)
        try:
            is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        except OSError:  # its file system was unmounted meanwhile
            os.close(fd)
            raise
        if is_folder:
            return cls._from_folder(fd, path)
        files = cls({path.name: _regular(fd, path)})
        try:
            if not _is_weights(path.name):
                recognised.check_names([path.name])
        except InvalidSource:
            files.close()
            raise
        return files

    @classmethod
    def from_folder(cls, path: Path) -> SourceFiles:
        """Opens a folder like `from_path`."""
        return cls.from_path(path)

    @classmethod
    def _from_folder(cls, folder: int, path: Path) -> SourceFiles:
        """Opens the files of an open folder, and closes the folder's descriptor."""
        files = cls({})
        try:
            names = _bounded_listing(folder, path)

            def open_index(name: str) -> Index:
                files._files[name] = _open(folder, path / name)
                return _read_index(files._files[name], name)

            recognised.check_one_thing(names, path.name)
            weights, _ = _choose(names, open_index)
            if not weights:
                _check_not_foreign(names)  # which would not be opened
            side_files = [name for name in names if matches(name, (*SIDE_FILES, ADAPTER))]
            for name in _checked_names([*weights, *side_files]):
                if name in names and name not in files:
                    files._files[name] = _open(folder, path / name)
            for name in names:
                kept = pooling_name(f"{name}/config.json")
                if kept and (file := _inner(folder, path / name / "config.json")) is not None:
                    files._files[kept] = file
        except BaseException:
            files.close()
            raise
        finally:
            os.close(folder)
        return files

    @classmethod
    def from_fds(cls, fds: Mapping[str, int]) -> Self:
        """Takes over received descriptors. Names are relative to the source."""
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


def read_source(files: SourceFiles, converter: pickles.Converter) -> Source:
    """Makes the table of all tensors of a source. Raises InvalidSource if it is malformed, incomplete or hostile."""
    names, index = _weights(files)
    opened = [files[name] for name in names]
    side_files = {name: files[name] for name in files.matching(SIDE_FILES)}
    for name, file in side_files.items():
        check_side_file(file, name)
    tables: dict[str, Table] = {}
    metadata: dict[str, str] = {}
    for number, name in enumerate(names):
        recognised.check_weights(opened[number], pickle=matches(name, PICKLES))
        if not matches(name, PICKLES):
            found = header.read(opened[number].fd, opened[number].path)
            tables[name] = _table(found, number, opened[number].path)
            metadata = {**found.metadata, **metadata}
    metadata.pop(header.ALIASES, None)
    with ExitStack() as made:
        if numbers := [number for number, name in enumerate(names) if name not in tables]:
            unpacked, spill = converter.tables(opened, numbers)
            tables |= {names[number]: table for number, table in zip(numbers, unpacked, strict=True)}
            if spill is not None:
                made.callback(os.close, spill.fd)
                opened.append(spill)
        of_adapter = is_adapter(files)
        tensors, aliases = _plain(*_merged(tables, index), of_adapter=of_adapter)
        wrappers.check_saved_whole(tensors, of_adapter=of_adapter)
        if matches(names[0], ("*.pth",)):
            trainers.check_names([tensor.name for tensor in tensors], names[0])
        return Source(tuple(opened), tensors, aliases, metadata, side_files, made.pop_all())


def with_config(source: Source, config: Mapping[str, object]) -> Source:
    """Returns the source with another config.json."""
    fd = os.memfd_create("flashd:config", os.MFD_CLOEXEC)
    source.made.callback(os.close, fd)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps(config, indent=2).encode())
    return replace(source, side_files={**source.side_files, CONFIG: OpenFile(fd, CONFIG)})


def is_adapter(files: SourceFiles) -> bool:
    """Tells whether a source is an adapter instead of a whole model."""
    names, _ = _choose(list(files), lambda name: _read_index(files[name], name))
    return ADAPTER in files and set(names) <= set(_ADAPTER_WEIGHTS)


def _table(found: header.Header, number: int, path: str) -> Table:
    """Returns the tensors of a safetensors file, with offsets in the file."""
    tensors = tuple(
        SourceTensor(t.name, t.dtype, t.shape, number, Extent(found.data_offset + t.extent.offset, t.extent.length))
        for t in found.tensors
    )
    return Table(tensors, header.aliases(found, path))


def _plain(
    tensors: tuple[SourceTensor, ...], aliases: Mapping[str, str], *, of_adapter: bool
) -> tuple[tuple[SourceTensor, ...], Mapping[str, str]]:
    """Renames tensors of a saved wrapper to the names of the model itself."""
    plain = wrappers.plain_names([*(tensor.name for tensor in tensors), *aliases], of_adapter=of_adapter)
    renamed = tuple(t if plain[t.name] == t.name else replace(t, name=plain[t.name]) for t in tensors)
    return renamed, {plain[alias]: plain[name] for alias, name in aliases.items()}


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
            raise InvalidSource(f"the index says that {name!r} is in {shard}, but it is not")
    if not tensors:
        raise InvalidSource("the weights contain no tensors")
    return tuple(tensors), aliases


def missing_shards(path: Path) -> list[str]:
    """Returns the missing shards of a folder, by its index, or by the numbers in the names of existing shards.

    Raises InvalidSource for an invalid index.
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
    """Tells whether a folder or file looks like a source, even one that has to be refused with an error."""
    if not path.is_dir():
        return _is_weights(path.name)
    telling = {convention.index for convention in CONVENTIONS} | {ADAPTER}
    names = _listing(path)
    are_weights = any(_is_weights(name) or name in telling or matches(name, _CONSOLIDATED) for name in names)
    return are_weights or trainers.are_shards(names)


def has_name_of_all(name: str) -> bool:
    """Tells whether a file of weights is named as those of all models are, such as `model.safetensors`."""
    return Path(name).stem in {Path(convention.single).stem for convention in CONVENTIONS}


def is_part_of_a_model(name: str) -> bool:
    """Tells by its name whether a file belongs to a model whose other files are beside it."""
    return matches(name, (*SIDE_FILES, ADAPTER, *WEIGHTS, "*.index.json"))


def is_one_thing(path: Path) -> bool:
    """Tells whether a folder is refused as a whole, so that no part of it is a separate model."""
    return path.is_dir() and recognised.is_one_thing(_listing(path))


def is_foreign(path: Path) -> bool:
    """Tells whether a folder or file is a model in an unsupported format, or one without weights."""
    if not path.is_dir():
        return recognised.is_foreign([path.name])
    names = _listing(path)
    return CONFIG in names or recognised.is_foreign(names) or recognised.is_one_thing(names)


def _listing(path: Path) -> list[str]:
    return os.listdir(path)  # noqa: PTH208 -- only names are needed, thousands of times


def _bounded_listing(folder: int, path: Path) -> list[str]:
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > MAX_ENTRIES:
                raise InvalidSource(
                    f"{path} has more than {MAX_ENTRIES} entries", hint="drop each model in a separate folder"
                )
    return names


def _checked_names(names: list[str]) -> list[str]:
    """Checks that names of files are safe in a message, a manifest and a terminal, and returns them."""
    if len(names) > MAX_FILES:
        raise InvalidSource(f"there are {len(names)} files; the limit is {MAX_FILES}")
    for name in names:
        if "/" in name or not name.isprintable() or name in {"", ".", ".."}:
            raise InvalidSource(f"{name!r} is not the name of a file", hint="use the files of one folder, by name")
    return names


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Matches names like a shell: patterns do not match hidden files or other debris."""
    return not is_debris(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_weights(name: str) -> bool:
    return matches(name, WEIGHTS) and not matches(name, NOT_WEIGHTS)


def pooling_name(path: str) -> str:
    """Returns the side file's name for the config of a pooling, 1_Pooling/config.json in a folder of
    sentence-transformers; empty for other files.
    """
    found = _POOLING.fullmatch(path)
    return f"{found[1]}.json" if found else ""


def pooling_path(name: str) -> str:
    """Returns the path of a side file in its folder: the reverse of `pooling_name`; other names unchanged."""
    path = f"{name.removesuffix('.json')}/config.json"
    return path if pooling_name(path) == name else name


def _inner(folder: int, path: Path) -> OpenFile | None:
    """Opens a file in a subfolder; None unless both exist."""
    try:
        inner = os.open(path.parent.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None  # a file or a link
    try:
        os.stat(path.name, dir_fd=inner, follow_symlinks=False)
        return _open(inner, path)
    except FileNotFoundError:
        return None
    finally:
        os.close(inner)


@contextmanager
def _parent(path: Path, beneath: Path | None) -> Iterator[int]:
    """Opens the parent folder of a path, to open the path relative to it."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    with ExitStack() as opened:
        at = path.parent if beneath is None else beneath
        try:
            fd = os.open(at, flags)
            opened.callback(os.close, fd)
            for part in path.parent.relative_to(at).parts:
                at = at / part
                fd = os.open(part, flags | os.O_NOFOLLOW, dir_fd=fd)
                opened.callback(os.close, fd)
        except OSError as error:
            raise _unreadable(at, error) from None
        yield fd


def _open(folder: int | None, path: Path) -> OpenFile:
    """Opens a regular file, relative to an open folder or by its path."""
    return _regular(_open_at(folder, path), path)


def _open_at(folder: int | None, path: Path) -> int:
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever (open(2)); regular files ignore it.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path.name or path, flags, dir_fd=folder) if folder is not None else os.open(path, flags)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InvalidSource:
    # Of a link ELOOP, or ENOTDIR with O_DIRECTORY (open(2)).
    if error.errno in {errno.ELOOP, errno.ENOTDIR} and path.is_symlink():
        hint = "copy its target: cp -rL follows links"
        return InvalidSource(f"{path} is a symbolic link, which is not followed", hint=hint)
    return InvalidSource(f"{path} cannot be read: {error.strerror}")


def _regular(fd: int, path: Path) -> OpenFile:
    try:
        _check_regular(os.fstat(fd), str(path))
    except BaseException:
        os.close(fd)
        raise
    return OpenFile(fd, str(path))


def _check_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidSource(f"{path} is not a regular file")


def _choose(names: Collection[str], read_index: Callable[[str], Index]) -> tuple[list[str], Index]:
    """Chooses the files of weights, with the contents of their index. Some files may still be missing."""
    for convention in CONVENTIONS:
        index = read_index(convention.index) if convention.index in names else {}
        shards = set(index.values())
        if convention.single in names and convention.single not in shards:
            return [convention.single], {}  # an index beside it was left by an earlier save
        if shards:
            return sorted(shards), index
        found = {n for n in names if matches(n, convention.patterns) and not matches(n, NOT_WEIGHTS)}
        if found := trainers.latest_epoch(found):
            return sorted(found | whole_series(found, limit=MAX_FILES)), {}
    for pattern in _CONSOLIDATED:
        if found := {name for name in names if matches(name, (pattern,))}:
            return sorted(found | whole_series(found, limit=MAX_FILES)), {}
    if ADAPTER in names:
        return [next((name for name in _ADAPTER_WEIGHTS if name in names), _ADAPTER_WEIGHTS[0])], {}
    return _one_gguf({name for name in names if matches(name, GGUF)}), {}


def _one_gguf(found: Collection[str]) -> list[str]:
    """Chooses the model among GGUF files: one file, or a series. Raises InvalidSource if there are several models."""
    if not found:
        return []
    models = sorted(name for name in found if not matches(name, _BESIDE_GGUF)) or sorted(found)
    whole = whole_series(models[:1], limit=MAX_FILES) or {models[0]}
    if others := sorted(set(models) - whole):
        hint = "put each into a folder of its own, or drop one file alone; on the hub, name one: OWNER/NAME:Q4_K_M"
        raise InvalidSource(f"there are several GGUF models: {models[0]}, {others[0]}", hint=hint)
    return sorted(whole)


def gguf_names(files: SourceFiles) -> Sequence[str]:
    """Returns the GGUF files of a source, in the order of their numbers; none if it is of another form."""
    names = _choose(list(files), lambda name: _read_index(files[name], name))[0]
    return _weights(files)[0] if names and all(matches(name, GGUF) for name in names) else ()


def needed_files(names: Collection[str], read_index: Callable[[str], Index]) -> tuple[list[str], list[str]]:
    """Returns the files of a folder that a source needs: weights and others. Raises InvalidSource if it is not one."""
    indexes: list[str] = []

    def note_index(name: str) -> Index:
        indexes.append(name)
        return read_index(name)

    weights, _ = _checked_choice(names, note_index)
    others = [name for name in sorted(names) if matches(name, (*SIDE_FILES, ADAPTER))]
    _checked_names([*weights, *indexes, *others])
    return weights, [*indexes, *others]


def _weights(files: SourceFiles) -> tuple[list[str], Index]:
    """Returns the files of weights, which all exist, with the contents of their index. Raises InvalidSource."""
    return _checked_choice(list(files), lambda name: _read_index(files[name], name))


def _checked_choice(names: Collection[str], read_index: Callable[[str], Index]) -> tuple[list[str], Index]:
    """Chooses like `_choose`. Raises InvalidSource if there are no weights, or if some are missing."""
    recognised.check_one_thing(names)
    weights, index = _choose(names, read_index)
    if missing := sorted(set(weights) - set(names)):
        what = f"{len(missing)} files of weights are missing, the first is {missing[0]}"
        is_one = len(names) == 1  # which may have been named, with the others beside it
        hint = "put all into one folder, and name the folder" if is_one else "copy the missing files"
        raise InvalidSource(what, hint=f"finish the download, or {hint}")
    if weights:
        return weights, index
    _check_not_foreign(names)
    hint = "a source must have *.safetensors, *.gguf, or PyTorch's *.bin, *.pt, *.pth or *.ckpt"
    raise InvalidSource("there are no weights", hint=hint)


def _check_not_foreign(names: Collection[str]) -> None:
    trainers.check_whole(names)
    recognised.check_names(names)


def _read_index(file: OpenFile, name: str) -> Index:
    return parse_index(read_whole(file, header.MAX_HEADER_BYTES), name)


def parse_index(raw: bytes, name: str) -> Index:
    """Parses an untrusted index from tensors to files, which must all be files of weights in the same folder."""
    document = read_json(raw, name)
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
    """Reads a small file. Raises InvalidSource if it is too large, or TransferFailed if it cannot be read."""
    size_bytes = _check_size(file, limit_bytes)
    recognised.check_small_file(file, file.path)
    try:
        return os.pread(file.fd, size_bytes, 0)
    except OSError as error:
        raise TransferFailed(f"read {file.path}: {error.strerror}") from None


def check_side_file(file: OpenFile, name: str) -> None:
    """Checks a side file. Raises InvalidSource if it is too large, a placeholder, or does not match its name.

    Small files are parsed. For vocabularies, which would take a second and much memory, only the ends are checked.
    """
    size_bytes = _check_size(file, MAX_SIDE_FILE_BYTES)
    recognised.check_small_file(file, name)
    if not name.endswith(".json"):
        return
    raw = read_whole(file)
    if size_bytes <= MAX_PARSED_BYTES:
        read_json(raw, name, constants=True)
        return
    text = as_utf8(raw, name)
    if text[:_END_BYTES].lstrip()[:1] + text[-_END_BYTES:].rstrip()[-1:] not in {b"{}", b"[]"}:
        raise InvalidSource(f"{name} is not valid JSON, or is cut short", hint="copy or download it again")


def side_file(file: OpenFile, name: str) -> bytes:
    """Reads a side file in the form for engines, without byte order mark or UTF-16. Raises InvalidSource."""
    raw = read_whole(file)
    return as_utf8(raw, name) if name.endswith(".json") else raw


def _check_size(file: OpenFile, limit_bytes: int) -> int:
    size_bytes = os.fstat(file.fd).st_size
    if size_bytes > limit_bytes:
        sizes = f"{format_bytes(size_bytes)}; the limit is {format_bytes(limit_bytes)}"
        raise InvalidSource(f"{file.path} is {sizes}")
    return size_bytes
