# SPDX-License-Identifier: Apache-2.0
"""Recognises files that trainers leave in a folder beside a model, or instead of one.

transformers' Trainer saves `checkpoint-STEP` folders with the state of the training, torchtune a file for each shard
and epoch, and DeepSpeed and FSDP shards that only their own tools can join.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection

from flashd.checkpoint.source.debris import is_debris
from flashd.errors import InvalidSource

NOT_WEIGHTS = (
    "training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*", "recipe_state*", "adapter_*.pt",
    "*_model_states.pt", "*_optim_states.pt",
)  # fmt: skip
_STEP = re.compile(r"checkpoint-(\d{1,15})")
_EPOCH = re.compile(r"hf_model_\d+_(\d{1,9})\.pt")  # torchtune: shard, then epoch
# Files by which trainers are recognised, and the commands that join their shards.
_SHARDED = (
    (("zero_to_fp32.py", "*_model_states.pt", "*_optim_states.pt"), "DeepSpeed", "python zero_to_fp32.py . model"),
    (("*.distcp", "pytorch_model_fsdp_*"), "FSDP", "accelerate merge-weights pytorch_model_fsdp_0 model"),
)
# Meta's names, such as "tok_embeddings.weight", are unknown to our engines.
_METAS = {"tok_embeddings.weight", "layers.0.attention.wq.weight"}


def step_of(name: str) -> int | None:
    """Returns the training step of a folder of the Trainer."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_being_saved(name: str) -> bool:
    """Tells whether a folder is unfinished: the Trainer renames it when it is complete."""
    return name.startswith("tmp-") and step_of(name.removeprefix("tmp-")) is not None


def latest_epoch(names: Collection[str]) -> set[str]:
    """Removes torchtune's files of epochs before the last."""
    epochs = {name: int(match[1]) for name in names if (match := _EPOCH.fullmatch(name))}
    last = max(epochs.values(), default=0)
    return {name for name in names if epochs.get(name, last) == last}


def are_shards(names: Collection[str]) -> bool:
    """Tells whether there are shards of a distributed training."""
    return any(_have(names, patterns) for patterns, _, _ in _SHARDED)


def check_whole(names: Collection[str]) -> None:
    """Refuses shards of a training in place of a model. Raises InvalidSource with the command that joins them."""
    for patterns, who, command in _SHARDED:
        if _have(names, patterns):
            what = f"these are shards of a training with {who}, which only its own tools can join"
            raise InvalidSource(
                what, hint=f"run: {command}; then drop the folder model, with the config.json beside it"
            )


def check_names(tensors: Collection[str], path: str) -> None:
    """Refuses weights under names known only to their maker's code. Raises InvalidSource."""
    if set(tensors) >= _METAS:
        hint = "pull it in the layout of transformers, or convert it: transformers' convert_llama_weights_to_hf.py"
        raise InvalidSource(f"{path} has its tensors under Meta's names, which no engine here knows", hint=hint)


def _have(names: Collection[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in names if not is_debris(n) for pattern in patterns)
