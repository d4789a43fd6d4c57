# SPDX-License-Identifier: Apache-2.0
"""How does a transformers model live in an arena that is not its own?

transformers builds the model and is given, as its state dict, tensors over the mapped arena. What it uses as it is
stays there: no byte is copied. What it must convert (experts that it fuses, say) it copies, and then rebinding means
building anew. Parking drops every reference to the mapping, so that it goes away; waking and rebinding point the same
parameters at the same offsets of another mapping. Equal layouts are what the architecture key guarantees.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from flashd.checkpoint import header
from flashd.engines.surroundings import read_all
from flashd.errors import EngineFailed, Unsupported
from flashd.tensors import bytes_tensor, torch_tensors

_MOST_TOKENIZERS = 2  # of 150,000 tokens, one takes 100 MB, and people go to and fro between two models
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_HINT = "a newer transformers may have it; code that comes with a model is never run"


@dataclass(frozen=True, slots=True)
class SideFile:
    """Files of equal digests are equal. The descriptor lasts as long as the order that it came with."""

    digest: str
    fd: int


@dataclass(frozen=True, slots=True)
class Weights:
    """What the daemon hands over: an arena to map, its layout, and the side files by name."""

    arena_fd: int
    arena_bytes: int
    layout: str
    side_files: Mapping[str, SideFile]

    @property
    def digests(self) -> Mapping[str, str]:
        return {name: file.digest for name, file in self.side_files.items()}


@dataclass(frozen=True, slots=True)
class View:
    """Where in the arena a tensor of the model lies."""

    tensor: torch.Tensor
    offset_bytes: int
    span_bytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class Model:
    """A model and its tokenizer, bound to weights. Not thread-safe: callers take turns. What raises changes nothing."""

    module: Any
    tokenizer: Any
    generation: GenerationConfig
    _digests: Mapping[str, str]  # of the side files that count now

    def __init__(self, weights: Weights, scratch: Path) -> None:
        """Raises Unsupported if transformers itself does not have the architecture."""
        self._scratch = scratch
        self._tokenizers: dict[frozenset[tuple[str, str]], Any] = {}  # by their files; what was used last is last
        self._build(weights)

    @property
    def can_generate(self) -> bool:
        return bool(self.module.can_generate())

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that transformers had to convert, and that are therefore this process's own."""
        return self._copied_bytes

    @property
    def max_positions(self) -> int:
        text = self.module.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", 0) or 2048)

    def unbind(self) -> None:
        """Lets go of the arena: the mapping ends with the last tensor over it."""
        for view in self._views:
            view.tensor.data = torch.empty(0, dtype=view.dtype)
        if self._copied_bytes:
            del self.module

    def bind(self, weights: Weights) -> None:
        """Takes weights of the same layout; side files may differ (a fine-tune's template, say)."""
        if self._copied_bytes:
            self._build(weights)
            return
        region = _mapped(weights)
        if weights.digests != self._digests:
            tokenizer = self._tokenizer_of(weights.side_files)
            with self._folder_of(weights.side_files, _GENERATION) as folder:
                generation = _generation(folder, self.module)
            self.tokenizer, self.generation, self._digests = tokenizer, generation, weights.digests
        self._point_at(region)

    def _build(self, weights: Weights) -> None:
        region = _mapped(weights)
        layout = header.parse(weights.layout.encode(), data_bytes=weights.arena_bytes, path="the layout")
        with self._folder_of(weights.side_files, _CONFIG, _GENERATION) as folder:
            config = _config(folder)
            tokenizer = self._tokenizer_of(weights.side_files)
            tensors = torch_tensors(bytes_tensor(region), layout)
            dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
            dtype = dtypes.pop() if len(dtypes) == 1 else getattr(config, "dtype", None) or torch.float32
            cls = _class_of(config.architectures)
            try:
                module = cls.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)
            except RuntimeError:
                if others := _other_shapes(cls, config, tensors):
                    hint = "put the one that belongs to the weights beside them"
                    raise EngineFailed(f"its config.json is of other weights: {others}", hint=hint) from None
                raise
            module.eval().requires_grad_(False)
            generation = _generation(folder, module)
        self.module, self.tokenizer, self.generation = module, tokenizer, generation
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

    def _tokenizer_of(self, side_files: Mapping[str, SideFile]) -> Any:
        """Large vocabularies take a second to read: fine-tunes that have the same one, or come in turn, do not wait."""
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
        """transformers reads folders; this one, with those of the files that there are, exists only while it does."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            for name in side_files.keys() & set(names):
                (Path(folder) / name).write_bytes(read_all(side_files[name].fd))
            yield Path(folder)


def _mapped(weights: Weights) -> memoryview:
    """The arena, mapped for reading; unmapped when nothing refers to it any more."""
    mapping = mmap.mmap(weights.arena_fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    return memoryview(mapping)[: weights.arena_bytes]


def _config(folder: Path) -> Any:
    """Raises Unsupported if transformers itself does not know what config.json describes."""
    _class_of(json.loads((folder / _CONFIG).read_text()).get("architectures"))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).split("\n", 1)[0].replace(str(folder), "this folder")
        raise Unsupported(f"transformers cannot read its config.json: {reason}", hint=_HINT) from None


def _essence(name: str, file: SideFile) -> str:
    """Equal for what makes equal tokenizers: of config.json all may count, but for where it was saved once."""
    if name != _CONFIG:
        return file.digest
    config = json.loads(read_all(file.fd))
    config.pop("_name_or_path", None)
    return json.dumps(config, sort_keys=True)


def _tokenizer(folder: Path) -> Any:
    """None if there is none."""
    if not any(path.name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for path in folder.iterdir()):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _generation(folder: Path, module: Any) -> GenerationConfig:
    """How a model wants to be sampled from, and where it ends: as its checkpoint says, or as its configuration does."""
    if not module.can_generate():
        return GenerationConfig()
    if (folder / _GENERATION).exists():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(module.config)


def _class_of(architectures: Any) -> Any:
    """The class that config.json names, if it is one of transformers' own. Code that comes with a model never runs."""
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise Unsupported(f"transformers {transformers.__version__} has no architecture {name!r}", hint=_HINT)
    return cls


def _other_shapes(cls: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """The first few tensors that have other shapes than the configuration says."""
    with torch.device("meta"):
        expected = cls(config).state_dict()
    others = [
        f"{name} has {list(tensor.shape)}, and {list(expected[name].shape)} by that"
        for name, tensor in tensors.items()
        if name in expected and expected[name].shape != tensor.shape
    ]
    return ", ".join(sorted(others)[:2])


def _all_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Each parameter and buffer once, even if several modules share it."""
    seen: set[int] = set()
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
