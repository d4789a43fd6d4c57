# SPDX-License-Identifier: Apache-2.0
"""Which model does a person mean?"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping

from flashd.errors import InvalidArgument, NotFound
from flashd.store.records import Model


def find(models: Mapping[str, Model], text: str) -> Model:
    """By name, by alias, or by what one name alone matches in other case or by its last part.

    `models` are those that the person may know of. Raises NotFound, with the nearest names, or InvalidArgument where
    several match.
    """
    wanted = unicodedata.normalize("NFC", text).strip()
    labels = {alias: model for model in models.values() for alias in model.aliases} | dict(models)
    if wanted in labels:
        return labels[wanted]
    for is_same in (_same_but_for_case, _same_last_part):
        found = {model.name: model for label, model in labels.items() if is_same(label, wanted)}
        if len(found) > 1:
            raise InvalidArgument(
                f"{wanted!r} is the name of several models", hint="say which: " + ", ".join(sorted(found))
            )
        if found:
            return next(iter(found.values()))
    near = difflib.get_close_matches(wanted, labels, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "flash list shows the models there are"
    raise NotFound(f"there is no model {wanted!r}", hint=hint)


def _same_but_for_case(label: str, wanted: str) -> bool:
    return label.casefold() == wanted.casefold()


def _same_last_part(label: str, wanted: str) -> bool:
    return "/" not in wanted and label.rsplit("/", 1)[-1].casefold() == wanted.casefold()
