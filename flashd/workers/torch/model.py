# SPDX-License-Identifier: Apache-2.0
"""A transformers model whose weights are in the daemon's arena.

transformers builds the model from a state dict of tensors over the mapped arena. Tensors that it uses unchanged stay
there and are not copied. Tensors that it has to convert (such as fused experts) are copied, and rebinding such a model
means building it again. Parking drops all references to the mapping, which ends it; waking and rebinding point the same
parameters at the same offsets of another mapping. The architecture key guarantees equal layouts.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from flashd.checkpoint import fitting, header, manifest
from flashd.checkpoint.json_reader import read_json
from flashd.engines.process_info import read_all
from flashd.errors import EngineFailed, InvalidSource, Unsupported
from flashd.tensors import bytes_tensor, torch_tensors
from flashd.workers import pooling
from flashd.workers.pooling import Pooling
from flashd.workers.torch import defaults, loading, templates
from flashd.workers.torch.defaults import Defaults

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_MOST_TOKENIZERS = 2  # one of 150,000 tokens takes 100 MB, and users often alternate between two models
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_HINT = "a newer transformers may support it; code that comes with a model is never run"


@dataclass(frozen=True, slots=True)
class SideFile:
    """A side file, identified by its digest. The descriptor is valid only while its order is carried out."""

    digest: str
    fd: int


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights from the daemon: an arena to map, its layout, and the side files by name."""

    arena_fd: int
    arena_bytes: int
    layout: str
    side_files: Mapping[str, SideFile]

    @property
    def digests(self) -> Mapping[str, str]:
        return {name: file.digest for name, file in self.side_files.items()}


@dataclass(frozen=True, slots=True)
class View:
    """The place of a model's tensor in the arena."""

    tensor: torch.Tensor
    offset_bytes: int
    span_bytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class Model:
    """A model and its tokenizer, bound to weights. Not thread-safe. A method that raises has changed nothing."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # None without a tokenizer
    defaults: Defaults
    pooling: Pooling
    _digests: Mapping[str, str]  # of the current side files

    def __init__(self, weights: Weights, scratch: Path) -> None:
        """Loads a model. Raises Unsupported if transformers itself lacks the architecture."""
        self._scratch = scratch
        self._tokenizers: dict[
            frozenset[tuple[str, str]], PreTrainedTokenizerBase | None
        ] = {}  # by their files; the one used last is last
        self._build(weights)

    @property
    def can_generate(self) -> bool:
        return bool(self.module.can_generate())

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that transformers had to convert, so that this process has its own copy."""
        return self._copied_bytes

    @property
    def max_positions(self) -> int:
        text = self.module.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", 0) or 2048) - self._unused_positions

    @property
    def embedding_rows(self) -> int:
        return int(self.module.get_input_embeddings().weight.shape[0])

    @property
    def _unused_positions(self) -> int:
        """Number of unused positions: RoBERTa and related models count positions from the one after padding."""
        embeddings = getattr(getattr(self.module, self.module.base_model_prefix, self.module), "embeddings", None)
        padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
        return 0 if padding is None else padding + 1

    def unbind(self) -> None:
        """Releases the arena. The mapping ends with the last tensor over it."""
        for view in self._views:
            view.tensor.data = torch.empty(0, dtype=view.dtype)
        if self._copied_bytes:
            del self.module

    def bind(self, weights: Weights) -> None:
        """Takes weights of the same layout. Side files, such as a fine-tune's template, may differ."""
        if self._copied_bytes:
            self._build(weights)
            return
        region = _mapped(weights)
        if weights.digests != self._digests:
            tokenizer = self._tokenizer_of(weights.side_files)
            asked = _defaults(weights.side_files, self.module, tokenizer), _pooling(weights.side_files)
            (self.defaults, self.pooling), self.tokenizer, self._digests = asked, tokenizer, weights.digests
        self._point_at(region)

    def _build(self, weights: Weights) -> None:
        region = _mapped(weights)
        layout = header.parse(weights.layout.encode(), data_bytes=weights.arena_bytes, path="the layout")
        tensors = torch_tensors(bytes_tensor(region), layout)
        with self._folder_of(weights.side_files, _CONFIG) as folder:
            _check_sizes(folder, tensors)
            config = _config(folder)
            tokenizer = self._tokenizer_of(weights.side_files)
            module = loading.load(_class_of(config.architectures), config, tensors)
        asked = _defaults(weights.side_files, module, tokenizer), _pooling(weights.side_files)
        (self.defaults, self.pooling), self.module, self.tokenizer = asked, module, tokenizer
        self._digests = weights.digests
        self._find_views(bytes_tensor(region))

    def _find_views(self, base: torch.Tensor) -> None:
        start, end = base.data_ptr(), base.data_ptr() + base.numel()
        self._views: list[View] = []
        self._copied_bytes = 0
        for tensor in _all_tensors(self.module):
            if start <= tensor.data_ptr() < end:
                span_bytes = tensor.element_size() * (
                    1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                )
                offset = tensor.data_ptr() - start
                self._views.append(View(tensor, offset, span_bytes, tensor.dtype, tensor.shape, tensor.stride()))
            elif isinstance(tensor, torch.nn.Parameter):
                self._copied_bytes += tensor.numel() * tensor.element_size()

    def _point_at(self, region: memoryview) -> None:
        base = bytes_tensor(region)
        for view in self._views:
            raw = base[view.offset_bytes : view.offset_bytes + view.span_bytes].view(view.dtype)
            view.tensor.data = raw.as_strided(view.shape, view.stride)

    def _tokenizer_of(self, side_files: Mapping[str, SideFile]) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, from a cache if possible, because reading a large vocabulary takes a second."""
        key = frozenset((name, _essence(name, file)) for name, file in side_files.items() if name != _GENERATION)
        if key in self._tokenizers:
            tokenizer = self._tokenizers.pop(key)
        else:
            with self._folder_of(side_files, *side_files) as folder:
                tokenizer = _tokenizer(folder)
        self._tokenizers[key] = tokenizer
        if len(self._tokenizers) > _MOST_TOKENIZERS:
            del self._tokenizers[next(iter(self._tokenizers))]
        return tokenizer

    @contextmanager
    def _folder_of(self, side_files: Mapping[str, SideFile], *names: str) -> Iterator[Path]:
        """Provides a temporary folder with the existing ones of these files, because transformers reads folders."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            for name in side_files.keys() & set(names):
                (Path(folder) / name).write_bytes(read_all(side_files[name].fd))
            yield Path(folder)


def _mapped(weights: Weights) -> memoryview:
    """Maps the arena for reading, until the last reference to it is gone."""
    mapping = mmap.mmap(weights.arena_fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    return memoryview(mapping)[: weights.arena_bytes]


def _check_sizes(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compares tensors with config.json, because building a model from a wrong one might take all memory.

    Raises EngineFailed.
    """
    config = manifest.read_config((folder / _CONFIG).read_bytes())
    if why := fitting.misfit(config, {name: tensor.shape for name, tensor in tensors.items()}):
        raise EngineFailed(f"its config.json is of other weights: {why}", hint=loading.OTHER_CONFIG)


def _config(folder: Path) -> PretrainedConfig:
    """Reads the config. Raises Unsupported if transformers itself does not know the model type."""
    _class_of(json.loads((folder / _CONFIG).read_text()).get("architectures"))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).split("\n", 1)[0].replace(str(folder), "this folder")
        raise Unsupported(f"transformers cannot read its config.json: {reason}", hint=_HINT) from None


def _essence(name: str, file: SideFile) -> str:
    """Returns a key that is equal for files that make equal tokenizers.

    In config.json, only its former path is ignored.
    """
    if name != _CONFIG:
        return file.digest
    config = json.loads(read_all(file.fd))
    config.pop("_name_or_path", None)
    return json.dumps(config, sort_keys=True)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; None if there is none."""
    if not any(path.name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for path in folder.iterdir()):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if (template := templates.beside(folder)) is not None:
        tokenizer.chat_template = template
    return tokenizer


def _defaults(
    side_files: Mapping[str, SideFile], module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Defaults:
    """Reads the defaults from generation_config.json, or else config.json. Raises EngineFailed if it is malformed."""
    if not module.can_generate():
        return Defaults()
    if (file := side_files.get(_GENERATION)) is None:
        return defaults.read(GenerationConfig.from_model_config(module.config).to_dict(), tokenizer)
    try:
        settings = read_json(read_all(file.fd), _GENERATION, constants=True)
    except InvalidSource as error:
        raise EngineFailed(error.message, hint="remove it, or replace it with that of the model's base") from None
    if not isinstance(settings, dict):
        raise EngineFailed(f"{_GENERATION} is not a JSON object")
    return defaults.read(settings, tokenizer)


def _pooling(side_files: Mapping[str, SideFile]) -> Pooling:
    found = pooling.declared(lambda name: read_all(side_files[name].fd) if name in side_files else None)
    return found or Pooling()


def _class_of(architectures: object) -> type[PreTrainedModel]:
    """Returns the class that config.json names, if it is transformers' own, because code of models is never run."""
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not name:
        hint = 'add "architectures" to its config.json, such as ["LlamaForCausalLM"], and drop it again'
        raise Unsupported("its config.json does not name the class of the model", hint=hint)
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise Unsupported(f"transformers {transformers.__version__} has no architecture {name!r}", hint=_HINT)
    return cls


def _all_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yields each parameter and buffer once, even if several modules share it."""
    seen: set[int] = set()
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
