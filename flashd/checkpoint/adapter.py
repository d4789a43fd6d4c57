# SPDX-License-Identifier: Apache-2.0
"""What does a LoRA adapter change in its base, and can that be done exactly?

An adapter as PEFT saves it: adapter_config.json says of which base and how it scales, its weights are pairs of factors
for some of the base's tensors, and whole tensors that were trained beside them. Here they become a plan, by names and
shapes alone; flashd/checkpoint/merge.py does the arithmetic. Whatever could change the result in a way that we do not
know is refused: an option of a later PEFT, a tensor that the base does not have, factors that do not fit.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from flashd.checkpoint.dtypes import size_of
from flashd.checkpoint.header import strict_json
from flashd.checkpoint.pickles import SourceTensor
from flashd.errors import InvalidSource

MERGEABLE = ("BF16", "F16", "F32", "F64")
MAX_PATTERNS = 10_000
MAX_PATTERN_BYTES = 1000
_MERGE_YOURSELF = "merge it with peft (merge_and_unload) and drop the result"
# What changes nothing of the merged weights: its tensors tell where the adapter applies, and the rest was for training.
_IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "bias", "lora_bias",
}  # fmt: skip
_UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "init_lora_weights",
}  # fmt: skip
# Others (pissa, olora, loftq, corda) change the base itself before training, and the adapter alone does not tell how.
_INNOCENT_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB])(?:\.default)?(?P<kind>|\.weight|\.bias)")
_WRAPPINGS = re.compile(r"\.base_layer(?=\.)|\.modules_to_save(?:\.default)?(?=\.)")

IN_CACHE = re.compile(r"models--([^/]+?)--([^/]+)(?:/|$)")  # huggingface_hub's cache: models--Qwen--Qwen3-8B/snapshots
_TRAINERS = re.compile(r"checkpoint-\d+")

Kind = Literal["linear", "transposed", "bias", "cast"]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """`scaling` is what factors are scaled by, as PEFT's configuration has it: checked, but not yet matched."""

    base: str
    scaling: Mapping[str, Any]
    fan_in_fan_out: bool


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor of the result: `start` in its own dtype, plus what the factors make, rounded once to `dtype`.

    `module` is the name that the adapter has for it, which patterns of ranks and alphas are matched with. linear: W +
    s·(B·A); transposed: W + s·(B·A)ᵀ; bias: W + s·b; cast: W. `a` and `b` are None where there are none.
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
        assert size_bytes is not None, "dtypes that can be merged fill bytes"
        return size_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """`kept` tensors are as some file has them. `untied` maps names that were another tensor's to that one.

    `vocabulary` is the new number of tokens, if the adapter changed it.
    """

    kept: tuple[SourceTensor, ...]
    changes: tuple[Change, ...]
    aliases: Mapping[str, str]
    untied: Mapping[str, str]
    vocabulary: int | None


def parse_config(raw: bytes) -> AdapterConfig:
    """Raises InvalidSource for what is no LoRA adapter, or one that cannot be merged exactly."""
    document = strict_json(raw, "adapter_config.json", constants=True)
    if not isinstance(document, dict):
        raise InvalidSource("adapter_config.json is not a JSON object")
    if (kind := document.get("peft_type")) != "LORA":
        raise _refused(f"it is an adapter of the kind {str(kind)[:40]!r}, and not LORA")
    if document.get("use_dora"):
        raise _refused("it uses DoRA, which scales every column by a norm of the merged weights")
    if document.get("init_lora_weights", True) not in _INNOCENT_INITS:
        raise _refused(
            f"it began as {str(document['init_lora_weights'])[:40]!r}, which changes the base before training"
        )
    for name, value in document.items():
        # An empty value of an option that we do not know is its default: off.
        if name not in _IRRELEVANT | _UNDERSTOOD and value:
            raise _refused(f"it sets {name[:40]!r}, and flashd does not know what that changes")
    base = document.get("base_model_name_or_path")
    return AdapterConfig(
        base=base.strip() if isinstance(base, str) and base.isprintable() and len(base) <= 1000 else "",
        scaling={
            "r": _number(document.get("r", 8), "r"),
            "lora_alpha": _number(document.get("lora_alpha", 8), "lora_alpha"),
            "use_rslora": bool(document.get("use_rslora")),
            "rank_pattern": _patterns(document.get("rank_pattern"), "rank_pattern"),
            "alpha_pattern": _patterns(document.get("alpha_pattern"), "alpha_pattern"),
        },
        fan_in_fan_out=bool(document.get("fan_in_fan_out")),
    )


def readings(recorded: str) -> Iterator[str]:
    """What a base may be called here that an adapter calls `recorded`, the most exact first.

    That is what its trainer was started with: an id of the hub, or a path on whatever machine that was.
    """
    yield recorded
    if match := IN_CACHE.search(recorded):
        yield f"{match[1]}/{match[2]}"
        yield match[2]
    parts = [part for part in PurePosixPath(recorded).parts if part != "/"]
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
    """What becomes of every tensor of the base, whose further names are `aliases`. Raises InvalidSource.

    `vocabulary` is the number of tokens that the base's configuration names.
    """
    whole, factors = _sorted_out(adapter)
    known = {tensor.name: tensor for tensor in base}
    names = known | {alias: known[name] for alias, name in aliases.items()}
    rename = _renaming([*whole, *factors], names.keys())
    whole = {rename(name): tensor for name, tensor in whole.items()}
    changes = {rename(name): _change(found, config) for name, found in factors.items()}
    touched = whole.keys() | changes.keys()
    # Two names of one tensor part when one of them is changed; equal bytes are found and tied again later.
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
    """What an adapter has for one tensor of the base; `module` as it names it."""

    module: str
    kind: Literal["matrix", "embedding", "bias"]
    a: SourceTensor | None
    b: SourceTensor
    prefers_transposed: bool = False


def _refused(why: str) -> InvalidSource:
    return InvalidSource(f"this adapter cannot be merged exactly: {why}", hint=_MERGE_YOURSELF)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidSource(f"{name} of adapter_config.json is not a number")
    return value


def _patterns(value: object, name: str) -> Mapping[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS or any(len(key) > MAX_PATTERN_BYTES for key in value):
        raise InvalidSource(f"{name} of adapter_config.json is not a table from modules to numbers")
    return {key: _number(number, name) for key, number in value.items()}


def _sorted_out(adapter: Iterable[SourceTensor]) -> tuple[dict[str, SourceTensor], dict[str, _Factors]]:
    """Whole tensors and factors, both by the name of the tensor they are for, in the adapter's words."""
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
            continue  # what a saved module replaces: PEFT itself never reads it
        elif "lora_" in name or "trainable_tokens" in name:
            raise _refused(f"its tensor {tensor.name!r} is of a kind that flashd does not know")
        else:
            plain = _WRAPPINGS.sub("", name)
            if plain not in whole or plain != name:  # PEFT saves an embedding by both names, of one tensor
                whole[plain] = tensor
    if not whole and not parts:
        raise InvalidSource("the adapter holds no tensors")
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
        raise _refused(f"of {module} it has {' and '.join(sorted(found)) or 'a bias'} alone")


def _change(found: _Factors, config: AdapterConfig) -> _Factors:
    """The factors, once they are known to fit each other."""
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
        # PEFT asks the module's class which way its weights lie. The shape tells as much, but for square ones.
        is_turned = start.shape == turned and (found.prefers_transposed or straight != turned)
        fits = is_turned or (start.shape == straight and found.kind != "embedding")
        kind = "transposed" if is_turned else "linear"
    if not fits:
        shapes = " and ".join(str(tensor.shape) for tensor in factors)
        raise InvalidSource(
            f"the adapter does not fit this base: {name} has the shape {start.shape}, and its factors {shapes}",
            hint="is it the base that it was trained on? flash alias can give the right one that name",
        )
    return Change(name, found.module, kind, original.dtype, start, found.a, found.b)  # type: ignore[arg-type]


def _check_mergeable(name: str, *dtypes: str) -> None:
    for dtype in dtypes:
        if dtype not in MERGEABLE:
            raise _refused(f"{name} is {dtype}, and only {', '.join(MERGEABLE)} can be added to without loss")


def _renaming(wanted: Collection[str], names: Collection[str]) -> Callable[[str], str]:
    """How the adapter's names become the base's: one rule for all of them.

    PEFT names modules as they are in memory; files may lack the outermost part (`transformer.h.0` and `h.0`), or have
    one more.
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
        hint="is it the base that it was trained on? flash alias can give the right one that name",
    )


def _resized(name: str, shape: tuple[int, ...], original: tuple[int, ...], vocabulary: int | None) -> int:
    is_vocabulary = len(original) == len(shape) > 0 and shape[1:] == original[1:] and original[0] == vocabulary
    if not is_vocabulary:
        raise InvalidSource(f"the adapter has {name} in the shape {shape}, and its base in {original}")
    return shape[0]


def _check_vocabulary(
    sizes: Collection[int], names: Mapping[str, SourceTensor], whole: Collection[str], vocabulary: int | None
) -> None:
    """A changed number of tokens must be changed everywhere."""
    left = [name for name, tensor in names.items() if tensor.shape[:1] == (vocabulary,) and name not in whole]
    if len(sizes) > 1 or left:
        raise _refused(f"it changes the number of tokens, but not of {left[0] if left else 'all tensors alike'}")
