# SPDX-License-Identifier: Apache-2.0
"""Checks that no weights of an architecture are missing, as far as names and shapes tell without building the model.

An engine would have to invent missing weights, so engines refuse to start without them. Here the common cases are
refused already when the source is dropped, with the names of the missing weights. Only architectures with uniform
layers are checked, and only against explicit values of their configuration; in doubt, the engine decides.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from flashd.checkpoint.architectures import EMBEDS, FOR_GENERATION
from flashd.checkpoint.dtypes import PLAIN_FLOATS
from flashd.checkpoint.source.pickles import SourceTensor
from flashd.checkpoint.source.wrappers import named
from flashd.errors import InvalidSource

# Decoders whose layers all have the same tensors, under these names. The keys are transformers' model_type.
_UNIFORM = {
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3", "olmo",
    "olmo2", "olmoe", "starcoder2", "granite", "granitemoe", "cohere", "cohere2", "stablelm", "smollm3", "seed_oss",
}  # fmt: skip
# The names of their heads and input embeddings; with quantisation the last part differs.
_HEAD = "lm_head."
_EMBEDDING = "model.embed_tokens.weight"
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)")
_MOST_LAYERS = 100_000
# Tables that some versions saved, but no version reads.
_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_ADVICE = (
    "check that no file is missing and config.json belongs to the weights, or copy, download or save the model again"
)


def check(
    tensors: Collection[SourceTensor],
    aliases: Mapping[str, str],
    config: Mapping[str, object],
    side_files: Collection[str],
) -> None:
    """Compares config.json with the weights. Raises InvalidSource, which names missing weights or contradictions."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _UNIFORM or config.get("architectures") != [FOR_GENERATION[kind]]:
        return
    if EMBEDS in side_files:
        return  # an embedding model needs no head
    by_name = {tensor.name: tensor for tensor in tensors}
    by_name |= {alias: by_name[name] for alias, name in aliases.items() if name in by_name}
    if not any(name.startswith("model.") for name in by_name):
        return  # special names, which the engine may know
    _check_embedding(by_name, config)
    _check_layers(by_name, config)
    if config.get("tie_word_embeddings") is False and not any(name.startswith(_HEAD) for name in by_name):
        what = "lm_head.weight is missing, which config.json requires (tie_word_embeddings: false)"
        raise InvalidSource(what, hint=_ADVICE)


def _check_embedding(by_name: Mapping[str, SourceTensor], config: Mapping[str, object]) -> None:
    embedding = by_name.get(_EMBEDDING)
    if embedding is None:
        if any(name.startswith(_EMBEDDING.removesuffix("weight")) for name in by_name):
            return  # quantised
        raise InvalidSource(f"{_EMBEDDING} is missing, which the model needs", hint=_ADVICE)
    if embedding.dtype not in PLAIN_FLOATS or len(embedding.shape) != 2:
        return
    for key, found in zip(("vocab_size", "hidden_size"), embedding.shape, strict=True):
        said = config.get(key)
        if type(said) is int and said != found:
            what = f"config.json is of other weights: it says {key} {said!r:.40}, but the embedding has {found}"
            raise InvalidSource(what, hint="replace it with the config.json that belongs to the weights")


def _check_layers(by_name: Mapping[str, SourceTensor], config: Mapping[str, object]) -> None:
    count = config.get("num_hidden_layers")
    if type(count) is not int or count < 1:
        return
    layers: dict[int, set[str]] = defaultdict(set)
    for name in by_name:
        if (match := _LAYER.fullmatch(name)) and not match[2].endswith(_BUFFERS):
            layers[int(match[1])].add(match[2])
    if count > _MOST_LAYERS:
        what = f"config.json is of other weights: it says num_hidden_layers {count!r:.40}, but there are {len(layers)}"
        raise InvalidSource(what, hint="replace it with the config.json that belongs to the weights")
    if missing := [number for number in range(count) if number not in layers]:
        numbers = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        what = f"config.json says that there are {count} layers, but the weights lack {numbers} (model.layers.N)"
        raise InvalidSource(what, hint=_ADVICE)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return  # some layers are mixtures of experts and others are not
    holes = _holes({number: _modules(names, config) for number, names in layers.items() if number < count})
    if holes:
        raise InvalidSource(f"weights are missing that other layers have: {named(holes)}", hint=_ADVICE)


def _modules(names: Iterable[str], config: Mapping[str, object]) -> set[str]:
    """Returns the tensors of a layer, or, with quantisation, its modules, because not all may be quantised."""
    is_quantised = isinstance(config.get("quantization_config"), dict)
    return {name.rpartition(".")[0] if is_quantised else name for name in names}


def _holes(layers: Mapping[int, set[str]]) -> list[str]:
    """Returns the names that at least half of the layers have, but some layer lacks."""
    counts = Counter(name for names in layers.values() for name in names)
    common = sorted(name for name, count in counts.items() if 2 * count >= len(layers))
    return [
        f"model.layers.{number}.{name}" for number in sorted(layers) for name in common if name not in layers[number]
    ]
