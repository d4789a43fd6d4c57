# SPDX-License-Identifier: Apache-2.0
"""Parses LoRA adapters, and plans the changes of their base.

An adapter is in PEFT's format: adapter_config.json has its base and scaling, and its weights are pairs of factors for
some of the base's tensors, and whole tensors that were trained too. This module plans the merge by names and shapes
only; lora/worker.py computes it. Everything that might change the result in an unknown way is refused: options of a
later PEFT, tensors that the base lacks, factors that do not fit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal

from flashd.checkpoint.dtypes import PLAIN_FLOATS, size_of
from flashd.checkpoint.json_reader import read_json
from flashd.checkpoint.source.pickles import SourceTensor
from flashd.errors import InvalidSource
from flashd.legible import legible

MAX_PATTERNS = 10_000
MAX_PATTERN_BYTES = 10_000  # enough for unsloth's patterns, which list every kind of module
MAX_RANK = 1 << 20
_LARGEST_NUMBER = 1e9
_MERGE_YOURSELF = "merge it with peft (merge_and_unload) and drop the result"
# Options without effect on the merged weights: tensors tell where the adapter applies, and the rest is for training.
_IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "bias", "lora_bias",
}  # fmt: skip
_UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "init_lora_weights",
}  # fmt: skip
# Others (pissa, olora, loftq, corda) change the base itself before training, in a way that the adapter does not record.
_INNOCENT_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB])(?:\.default)?(?P<kind>|\.weight|\.bias)")
_WRAPPINGS = re.compile(r"\.base_layer(?=\.)|\.modules_to_save(?:\.default)?(?=\.)")

IN_CACHE = re.compile(
    r"models--([^/\\]+?)--([^/\\]+)(?:[/\\]|$)"
)  # huggingface_hub's cache: models--Qwen--Qwen3-8B/snapshots
_TRAINERS = re.compile(r"checkpoint-\d+")
# Suffixes by unsloth and others for a model quantised by bitsandbytes: Qwen3-8B-unsloth-bnb-4bit.
_QUANTISED = re.compile(r"(?:-unsloth)?-bnb-[48]bit/?$", re.IGNORECASE)

Kind = Literal["linear", "transposed", "bias", "cast"]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A checked adapter_config.json. `scaling` has the scales of factors, with patterns not yet matched to modules."""

    base: str
    scaling: Mapping[str, object]
    fan_in_fan_out: bool


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor of the result: `start` in its own dtype plus the product of the factors, rounded once to `dtype`.

    `module` is the adapter's name for it, against which patterns of ranks and alphas are matched. linear: W + s·(B·A);
    transposed: W + s·(B·A)ᵀ; bias: W + s·b; cast: W. `a` and `b` are None if there are no factors.
    """

    name: str
    module: str
    kind: Kind
    dtype: str
    start: SourceTensor
    a: SourceTensor | None = None
    b: SourceTensor | None = None

    @property
    def size_bytes(self) -> int:
        size_bytes = size_of(self.dtype, self.start.shape)
        assert size_bytes is not None, "mergeable dtypes have whole bytes"
        return size_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan of a merge. `kept` tensors are copied from a file. `untied` maps former aliases to their stored tensors.

    `vocabulary` is the new number of tokens, if the adapter changes it.
    """

    kept: tuple[SourceTensor, ...]
    changes: tuple[Change, ...]
    aliases: Mapping[str, str]
    untied: Mapping[str, str]
    vocabulary: int | None


def parse_config(raw: bytes) -> AdapterConfig:
    """Parses adapter_config.json. Raises InvalidSource unless it is a LoRA adapter that can be merged exactly."""
    document = read_json(raw, "adapter_config.json", constants=True)
    if not isinstance(document, dict):
        raise InvalidSource("adapter_config.json is not a JSON object")
    if (kind := document.get("peft_type")) != "LORA":
        raise _refused(f"it is an adapter of the kind {_quoted(kind)}, not LORA")
    if document.get("use_dora"):
        raise _refused("it uses DoRA, which scales every column by a norm of the merged weights")
    if document.get("init_lora_weights", True) not in _INNOCENT_INITS:
        raise _refused(f"{_quoted(document['init_lora_weights'])} has changed the base before the training")
    for name, value in document.items():
        # An empty value of an unknown option is its default: off.
        if name not in _IRRELEVANT | _UNDERSTOOD and value:
            raise _refused(f"it sets {name[:40]!r}, which flashd does not know")
    base = document.get("base_model_name_or_path") or ""
    if not isinstance(base, str) or legible(base) != base:
        hint = "write a name from flash list as base_model_name_or_path in adapter_config.json"
        raise InvalidSource("the base in adapter_config.json is not a valid name of a model", hint=hint)
    return AdapterConfig(
        base=base.strip(),
        scaling={
            "r": _rank(document.get("r", 8), "r"),
            "lora_alpha": _number(document.get("lora_alpha", 8), "lora_alpha"),
            "use_rslora": bool(document.get("use_rslora")),
            "rank_pattern": _patterns(document.get("rank_pattern"), "rank_pattern", _rank),
            "alpha_pattern": _patterns(document.get("alpha_pattern"), "alpha_pattern", _number),
        },
        fan_in_fan_out=bool(document.get("fan_in_fan_out")),
    )


def readings(recorded: str) -> Iterator[str]:
    """Yields the names that a base recorded as `recorded` may have here, the most exact first.

    `recorded` is from the start of the training: an id on the hub, or a path on the machine of the training. For a base
    quantised for the training, the last name is that of the original model.
    """
    exact = list(dict.fromkeys(_readings(recorded)))
    yield from exact
    yield from dict.fromkeys(plain for name in exact if (plain := unquantised(name)) != name)


def unquantised(name: str) -> str:
    """Returns the name of the original model for one quantised by bitsandbytes; other names unchanged."""
    return _QUANTISED.sub("", name) or name


def _readings(recorded: str) -> Iterator[str]:
    yield recorded
    if match := IN_CACHE.search(recorded):
        yield f"{match[1]}/{match[2]}"
        yield match[2]
    kind = PureWindowsPath if "\\" in recorded else PurePosixPath
    parts = [part for part in kind(recorded).parts if part.strip("/\\")]
    if parts and _TRAINERS.fullmatch(parts[-1]):
        parts.pop()
    if len(parts) > 2:
        yield "/".join(parts[-2:])
    if parts:
        yield parts[-1]


def make_plan(
    config: AdapterConfig,
    adapter: Sequence[SourceTensor],
    base: Sequence[SourceTensor],
    aliases: Mapping[str, str],
    *,
    vocabulary: int | None,
) -> Plan:
    """Plans the change of every tensor of the base, whose additional names are `aliases`. Raises InvalidSource.

    `vocabulary` is the number of tokens in the base's configuration.
    """
    whole, factors = _sorted_out(adapter)
    known = {tensor.name: tensor for tensor in base}
    names = known | {alias: known[name] for alias, name in aliases.items()}
    rename = _renaming([*whole, *factors], names.keys())
    whole = {rename(name): tensor for name, tensor in whole.items()}
    changes = {rename(name): _change(found, config) for name, found in factors.items()}
    touched = whole.keys() | changes.keys()
    # Two names of one tensor are separated if one of them is changed; equal bytes are tied again later.
    untied = {a: name for a, name in aliases.items() if a in touched or name in touched}
    kept, changed = [], []
    sizes = set()
    for name, original in names.items():
        if name in aliases and name not in untied:
            continue
        start = whole.get(name, original)
        if start.shape != original.shape:
            sizes.add(_resized(name, start.shape, original.shape, vocabulary))
        if name in changes:
            changed.append(_placed(name, changes[name], start, original))
        elif start.dtype != original.dtype:
            _check_mergeable(name, original.dtype, start.dtype)
            changed.append(Change(name, name, "cast", original.dtype, start))
        else:
            kept.append(SourceTensor(name, start.dtype, start.shape, start.file, start.extent))
    if sizes:
        _check_vocabulary(sizes, names, whole.keys(), vocabulary)
    tied = {alias: name for alias, name in aliases.items() if alias not in untied}
    return Plan(tuple(kept), tuple(changed), tied, untied, sizes.pop() if sizes else None)


@dataclass(frozen=True, slots=True)
class _Factors:
    """The adapter's factors for one tensor of the base, which it calls `module`."""

    module: str
    kind: Literal["matrix", "embedding", "bias"]
    a: SourceTensor | None
    b: SourceTensor
    prefers_transposed: bool = False


def _refused(why: str) -> InvalidSource:
    return InvalidSource(f"this adapter cannot be merged exactly: {why}", hint=_MERGE_YOURSELF)


def _number(value: object, name: str) -> float:
    """Checks that a value is a number of plausible size, so that products stay finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
        raise InvalidSource(f"{name} of adapter_config.json is {_quoted(value)}, which is not a plausible number")
    return value


def _rank(value: object, name: str) -> float:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise InvalidSource(f"{name} of adapter_config.json is {_quoted(value)}, not a rank from 1 to {MAX_RANK}")
    return value


def _quoted(value: object) -> str:
    """Formats an untrusted value for a message."""
    if not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _patterns(value: object, name: str, number: Callable[[object, str], float]) -> Mapping[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS or any(len(key) > MAX_PATTERN_BYTES for key in value):
        raise InvalidSource(f"{name} of adapter_config.json is not a table from modules to numbers")
    return {key: number(found, f"{key[:80]!r} in {name}") for key, found in value.items()}


def _sorted_out(adapter: Iterable[SourceTensor]) -> tuple[dict[str, SourceTensor], dict[str, _Factors]]:
    """Separates whole tensors and factors, both by the adapter's name of their tensor."""
    whole: dict[str, SourceTensor] = {}
    parts: dict[str, dict[str, SourceTensor]] = defaultdict(dict)
    for tensor in adapter:
        name = tensor.name.removeprefix("base_model.model.")
        if match := _FACTOR.fullmatch(name):
            part = match["part"] + (".bias" if match["kind"] == ".bias" else "")
            if part in parts[match["module"]]:
                raise _refused(f"it has {part} of {match['module']} twice")
            parts[match["module"]][part] = tensor
        elif ".original_module." in name:
            continue  # replaced by a saved module; PEFT itself never reads it
        elif "lora_" in name or "trainable_tokens" in name:
            raise _refused(f"its tensor {tensor.name!r} is of an unknown kind")
        else:
            plain = _WRAPPINGS.sub("", name)
            if plain not in whole or plain != name:  # PEFT saves an embedding under both names
                whole[plain] = tensor
    if not whole and not parts:
        raise InvalidSource("the adapter contains no tensors")
    return whole, {name: factors for module, found in parts.items() for name, factors in _factors(module, found)}


def _factors(module: str, found: dict[str, SourceTensor]) -> Iterator[tuple[str, _Factors]]:
    bias = found.pop("lora_B.bias", None)
    if bias is not None:
        yield f"{module}.bias", _Factors(module, "bias", None, bias)
    if found.keys() == {"lora_A", "lora_B"}:
        yield f"{module}.weight", _Factors(module, "matrix", found["lora_A"], found["lora_B"])
    elif found.keys() == {"lora_embedding_A", "lora_embedding_B"}:
        yield f"{module}.weight", _Factors(module, "embedding", found["lora_embedding_A"], found["lora_embedding_B"])
    else:
        raise _refused(f"it has only {' and '.join(sorted(found)) or 'a bias'} of {module}")


def _change(found: _Factors, config: AdapterConfig) -> _Factors:
    """Checks that the factors fit each other, and returns them."""
    shapes = [tensor.shape for tensor in (found.a, found.b) if tensor is not None]
    sound = found.kind == "bias" and len(shapes[0]) == 1
    if found.a is not None:
        sound = len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] == shapes[1][1] > 0
    if not sound:
        raise _refused(f"the factors of {found.module} have the shapes {' and '.join(map(str, shapes))}")
    is_transposed = found.kind == "embedding" or config.fan_in_fan_out
    return _Factors(found.module, found.kind, found.a, found.b, is_transposed)


def _placed(name: str, found: _Factors, start: SourceTensor, original: SourceTensor) -> Change:
    factors = [tensor for tensor in (found.a, found.b) if tensor is not None]
    _check_mergeable(name, original.dtype, start.dtype, *(tensor.dtype for tensor in factors))
    if found.a is None:
        fits, kind = start.shape == found.b.shape, "bias"
    else:
        straight = (found.b.shape[0], found.a.shape[1])
        turned = straight[::-1]
        # PEFT knows the orientation of weights from the module's class. The shape tells it too, except for square ones.
        is_turned = start.shape == turned and (found.prefers_transposed or straight != turned)
        fits = is_turned or (start.shape == straight and found.kind != "embedding")
        kind = "transposed" if is_turned else "linear"
    if not fits:
        shapes = " and ".join(str(tensor.shape) for tensor in factors)
        raise InvalidSource(
            f"the adapter does not fit this base: {name} has the shape {start.shape}, but its factors {shapes}",
            hint="check that it was trained on this base; flash alias can give another model the base's name",
        )
    return Change(name, found.module, kind, original.dtype, start, found.a, found.b)  # type: ignore[arg-type]


def _check_mergeable(name: str, *dtypes: str) -> None:
    for dtype in dtypes:
        if dtype not in PLAIN_FLOATS:
            raise _refused(f"{name} is {dtype}, and only {', '.join(PLAIN_FLOATS)} can be added to without loss")


def _renaming(wanted: Collection[str], names: Collection[str]) -> Callable[[str], str]:
    """Finds a single rule that turns all names of the adapter into names of the base.

    PEFT uses the names of modules in memory; names in files may lack the outermost part (`transformer.h.0` and `h.0`),
    or have an additional one.
    """
    outer = sorted({name.split(".", 1)[0] for name in names})
    rules: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.split(".", 1)[-1],
        *(lambda name, prefix=prefix: f"{prefix}.{name}" for prefix in outer),
    ]
    for rule in rules:
        if all(rule(name) in names for name in wanted):
            return rule
    strange = next(name for name in wanted if name not in names)
    raise InvalidSource(
        f"the adapter does not fit this base, which has no tensor {strange!r}",
        hint="check that it was trained on this base; flash alias can give another model the base's name",
    )


def _resized(name: str, shape: tuple[int, ...], original: tuple[int, ...], vocabulary: int | None) -> int:
    is_vocabulary = len(original) == len(shape) > 0 and shape[1:] == original[1:] and original[0] == vocabulary
    if not is_vocabulary:
        raise InvalidSource(f"the adapter has {name} in the shape {shape}, but its base in {original}")
    return shape[0]


def _check_vocabulary(
    sizes: Collection[int], names: Mapping[str, SourceTensor], whole: Collection[str], vocabulary: int | None
) -> None:
    """Checks that a changed number of tokens is changed in all tensors. Raises InvalidSource."""
    left = [name for name, tensor in names.items() if tensor.shape[:1] == (vocabulary,) and name not in whole]
    if len(sizes) > 1 or left:
        raise _refused(f"it changes the number of tokens, but not in {left[0] if left else 'all tensors alike'}")
