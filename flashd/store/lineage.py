# SPDX-License-Identifier: Apache-2.0
"""Finds the base in the store that an adapter or a fine-tune names.

They name the model with which their training was started: an id on the hub, or a path on the machine of the training.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashd.checkpoint.lora.source import IN_CACHE, readings, unquantised
from flashd.errors import BaseMissing, InvalidArgument, InvalidSource, NotFound
from flashd.store import lookup
from flashd.store.names import check_name
from flashd.store.records import Model


def find_base(models: Mapping[str, Model], recorded: str, *, of: str) -> Model:
    """Returns the model that `recorded` means, for a model called `of`, which cannot be its own base.

    Raises BaseMissing, with a hint what to pull, or InvalidSource if several models match.
    """
    others = {name: model for name, model in models.items() if name != of}
    if not recorded:
        hint = "write its name into adapter_config.json, as base_model_name_or_path"
        raise InvalidSource(f"{of} does not name its base", hint=hint)
    for wanted in readings(recorded):
        for model in others.values():
            # The path of a dropped source, or an id on the hub followed by the revision.
            if wanted in {model.origin.location, model.origin.location.rpartition("@")[0]}:
                return model
        try:
            return lookup.find(others, wanted)
        except NotFound:
            continue
        except InvalidArgument as error:
            raise InvalidSource(f"the base of {of} is ambiguous: {error.message}", hint=error.hint) from None
    what = f"{of} needs its base, {recorded!r}, which is not in the store"
    raise BaseMissing(what, hint=_remedy(recorded), recorded=recorded)


def _remedy(recorded: str) -> str:
    """Suggests a remedy for a missing base. For a base quantised for training, it names the unquantised one."""
    plain = unquantised(recorded)
    if match := IN_CACHE.search(plain):
        plain = f"{match[1]}/{match[2]}"
    plain = plain.removeprefix("https://huggingface.co/")
    if plain.count("/") == 1 and "\\" not in plain and not plain.startswith(("/", ".", "~")):
        return f"flash pull {plain}; if it has another name here: flash alias NAME {plain}"
    *_, name = readings(plain)
    try:
        name = check_name(name)
    except InvalidArgument:  # not a valid name
        return "drop that model into the models folder too, and write its name into adapter_config.json"
    return f"drop that model into the models folder too; if it has another name here: flash alias NAME {name}"
