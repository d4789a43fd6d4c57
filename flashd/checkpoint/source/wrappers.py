# SPDX-License-Identifier: Apache-2.0
"""Removes the parts of tensors' names that wrappers around or inside a model have added.

torch.compile, data parallelism, DeepSpeed, FSDP, Lightning and PEFT add their own parts to all names. Engines look for
the plain names, and would not find their weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flashd.checkpoint.source.pickles import SourceTensor
from flashd.errors import InvalidSource

# Of torch.compile, Lightning's strategies, FSDP and activation checkpointing; modules within the model may have them
# too, and no module of a model is called so.
_PARTS = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Of data parallelism, DeepSpeed and PEFT: words that a model may use itself, so only where every name begins so.
_PREFIXES = ("module.", "base_model.model.")
# The attribute that most of Lightning's modules keep their model in. Many models begin all names so themselves, but
# then none goes on like this.
_ATTRIBUTE = "model."
_BEHIND_ATTRIBUTE = ("model.model.", "model.lm_head.", "model.transformer.h.", "model.module.", "model.base_model.")
_UNMERGED = (".lora_A.default.", ".lora_B.default.")


def plain_names(names: Collection[str], *, of_adapter: bool = False) -> Mapping[str, str]:
    """Maps names in the source to names in the model. Raises InvalidSource if two would become equal."""
    plain = {name: ".".join(part for part in name.split(".") if part not in _PARTS) or name for name in names}
    while prefix := _common(plain.values(), of_adapter=of_adapter):
        plain = {name: known.removeprefix(prefix) for name, known in plain.items()}
    first: dict[str, str] = {}
    for name, known in plain.items():
        if (other := first.setdefault(known, name)) != name:
            what = f"{other[:120]!r} and {name[:120]!r} differ only in parts added by a trainer"
            raise InvalidSource(what, hint="save the state dict of the model itself, without its wrapper")
    return plain


def _common(names: Collection[str], *, of_adapter: bool) -> str:
    """Returns the wrapper's prefix common to all names; empty if there is none."""
    for prefix in _PREFIXES:
        if names and all(name.startswith(prefix) and name != prefix for name in names):
            return prefix
    is_attribute = (
        not of_adapter
        and all(name.startswith(_ATTRIBUTE) and name != _ATTRIBUTE for name in names)
        and any(name.startswith(_BEHIND_ATTRIBUTE) for name in names)
    )
    return _ATTRIBUTE if is_attribute else ""


def check_saved_whole(tensors: Sequence[SourceTensor], *, of_adapter: bool = False) -> None:
    """Refuses weights saved before they were gathered or merged: empty weights, an adapter beside its base.

    Raises InvalidSource.
    """
    # ZeRO-3 keeps of each weight an empty stand-in, which save_pretrained writes if nobody has gathered them.
    empty = [t.name for t in tensors if t.shape == (0,) and t.name.endswith(("weight", "bias"))]
    if empty:
        what = f"{named(empty)} {'is' if len(empty) == 1 else 'are'} empty: DeepSpeed ZeRO-3 did not gather the weights"
        hint = (
            "in the trainer's folder run: python zero_to_fp32.py . OUT; or save again with "
            "stage3_gather_16bit_weights_on_model_save, or accelerator.get_state_dict(model)"
        )
        raise InvalidSource(what, hint=hint)
    if not of_adapter and (factors := [t.name for t in tensors if any(part in t.name for part in _UNMERGED)]):
        what = f"this is a model with an adapter beside its weights ({named(factors)}), not merged into them"
        raise InvalidSource(what, hint="save it after merge_and_unload(), or save the adapter alone")


def named(names: Sequence[str]) -> str:
    """Formats a few names for a message."""
    first = ", ".join(repr(name[:120]) for name in names[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
