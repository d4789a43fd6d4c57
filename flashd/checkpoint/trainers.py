# SPDX-License-Identifier: Apache-2.0
"""What do trainers leave in a folder beside a model, or instead of one?

transformers' Trainer saves `checkpoint-STEP` folders with the state of the training in them, torchtune a file for each
shard and epoch, DeepSpeed and FSDP shards that only their own tools can put together.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection

from flashd.errors import InvalidSource

NOT_WEIGHTS = (
    "training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*", "recipe_state*", "adapter_*.pt",
    "*_model_states.pt", "*_optim_states.pt",
)  # fmt: skip
_STEP = re.compile(r"checkpoint-(\d{1,15})")
_EPOCH = re.compile(r"hf_model_\d+_(\d{1,9})\.pt")  # torchtune: shard, then epoch
# Which files tell of whom, and what puts them together.
_SHARDED = (
    (("zero_to_fp32.py", "*_model_states.pt", "*_optim_states.pt"), "DeepSpeed", "python zero_to_fp32.py . model"),
    (("*.distcp", "pytorch_model_fsdp_*"), "FSDP", "accelerate merge-weights pytorch_model_fsdp_0 model"),
)
_WRAPPERS = ("_orig_mod.", "module.")
# As Meta names them: "tok_embeddings.weight" is nothing that an engine of ours looks for.
_METAS = {"tok_embeddings.weight", "layers.0.attention.wq.weight"}


def step_of(name: str) -> int | None:
    """The step that a folder of the Trainer is of."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_being_saved(name: str) -> bool:
    """A folder that the Trainer renames when it is whole."""
    return name.startswith("tmp-") and step_of(name.removeprefix("tmp-")) is not None


def latest_epoch(names: Collection[str]) -> set[str]:
    """Without torchtune's files of earlier epochs than the last."""
    epochs = {name: int(match[1]) for name in names if (match := _EPOCH.fullmatch(name))}
    last = max(epochs.values(), default=0)
    return {name for name in names if epochs.get(name, last) == last}


def are_shards(names: Collection[str]) -> bool:
    """Whether there is something of a training that was spread over processes."""
    return any(_have(names, patterns) for patterns, _, _ in _SHARDED)


def check_whole(names: Collection[str]) -> None:
    """Raises InvalidSource, saying what to run, if what is there are the shards of a training and not a model."""
    for patterns, who, command in _SHARDED:
        if _have(names, patterns):
            what = f"these are shards of a training with {who}, which only its own tools put together"
            raise InvalidSource(
                what, hint=f"run: {command}; then drop the folder model, with the config.json beside it"
            )


def check_names(tensors: Collection[str], path: str) -> None:
    """Raises InvalidSource for weights under names that only their maker's code knows."""
    if set(tensors) >= _METAS:
        hint = "pull it in the layout of transformers, or convert it: transformers' convert_llama_weights_to_hf.py"
        raise InvalidSource(f"{path} has its tensors under Meta's names, which no engine here knows", hint=hint)


def wrapper_of(names: Collection[str]) -> str:
    """What torch.compile or data parallelism has put before every name; empty if nothing."""
    return next((wrapper for wrapper in _WRAPPERS if names and all(name.startswith(wrapper) for name in names)), "")


def _have(names: Collection[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
