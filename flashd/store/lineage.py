# SPDX-License-Identifier: Apache-2.0
"""Which model in the store is the base that an adapter, or a fine-tune, names?

What they name is what its trainer was started with: an id of the hub, or a path on whatever machine that was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from flashd.checkpoint.adapter import IN_CACHE, readings
from flashd.errors import BaseMissing, InvalidArgument, InvalidSource, NotFound
from flashd.store import lookup
from flashd.store.records import Model


def find_base(models: Mapping[str, Model], recorded: str, *, of: str) -> Model:
    """The model that `recorded` means, for one called `of`, which cannot be its own base.

    Raises BaseMissing, saying what to pull, or InvalidSource if several could be meant.
    """
    others = {name: model for name, model in models.items() if name != of}
    if not recorded:
        hint = "write its name into adapter_config.json, as base_model_name_or_path"
        raise InvalidSource(f"{of} does not say which model is its base", hint=hint)
    for model in others.values():
        # A path that it was dropped at, or an id of the hub with the revision behind it.
        if recorded in {model.origin.location, model.origin.location.rpartition("@")[0]}:
            return model
    for wanted in readings(recorded):
        try:
            return lookup.find(others, wanted)
        except NotFound:
            continue
        except InvalidArgument as error:
            raise InvalidSource(f"the base of {of} is ambiguous: {error.message}", hint=error.hint) from None
    what = f"{of} needs its base, {recorded!r}, which is not in the store"
    raise BaseMissing(what, hint=_remedy(recorded), recorded=recorded)


def _remedy(recorded: str) -> str:
    if match := IN_CACHE.search(recorded):
        recorded = f"{match[1]}/{match[2]}"
    if recorded.count("/") == 1 and not recorded.startswith(("/", ".", "~")):
        return f"flash pull {recorded}; if it is here under another name: flash alias NAME {recorded}"
    name = PurePosixPath(recorded).name
    return f"drop that model into the models folder too; if it is here under another name: flash alias NAME {name}"
