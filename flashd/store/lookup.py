# SPDX-License-Identifier: Apache-2.0
"""Finds the model that a user means by a name."""

from __future__ import annotations

import functools
import operator
import unicodedata
from collections.abc import Iterable, Mapping

from flashd.errors import InvalidArgument, NotFound
from flashd.store.records import Model

_NEAR = 0.5  # share of common pairs of letters that makes two names similar
_MOST_SHOWN = 3
_LONGEST_SHOWN = 200  # characters of an unknown name in an error


def find(models: Mapping[str, Model], text: str) -> Model:
    """Finds a model by name or alias, else by the only name that matches in another case or by its last part.

    `models` are those that the user may see. Raises NotFound, with similar names, or InvalidArgument if several match.
    """
    wanted = unicodedata.normalize("NFC", text).strip()
    labels = {alias: model for model in models.values() for alias in model.aliases} | dict(models)
    if wanted in labels:
        return labels[wanted]
    for is_same in (_same_but_for_case, _same_last_part):
        found = {model.name: model for label, model in labels.items() if is_same(label, wanted)}
        if len(found) > 1:
            raise InvalidArgument(
                f"{wanted!r} matches several models", hint="choose one of: " + ", ".join(sorted(found))
            )
        if found:
            return next(iter(found.values()))
    near = nearest(wanted, labels)
    hint = f"did you mean {' or '.join(near)}?" if near else "flash list shows the models there are"
    raise NotFound(f"there is no model {wanted[:_LONGEST_SHOWN]!r}", hint=hint)


def nearest(wanted: str, labels: Iterable[str]) -> list[str]:
    """Returns the labels most similar to the typed name, best first, in time proportional to their number."""
    pairs = _pairs(wanted[:_LONGEST_SHOWN])
    alike = [label for label in labels if len(wanted) <= 2 * len(label) and len(label) <= 2 * len(wanted)]
    rated = ((2 * len(pairs & (other := _pairs(label))) / (len(pairs) + len(other)), label) for label in alike)
    near = sorted(((likeness, label) for likeness, label in rated if likeness >= _NEAR), key=lambda pair: -pair[0])
    return [label for _, label in near[:_MOST_SHOWN]]


@functools.lru_cache(maxsize=8192)
def _pairs(label: str) -> frozenset[str]:
    """Returns the pairs of adjacent letters, including those with the ends of the name."""
    text = f" {label.casefold()} "
    return frozenset(map(operator.add, text, text[1:]))


def _same_but_for_case(label: str, wanted: str) -> bool:
    return label.casefold() == wanted.casefold()


def _same_last_part(label: str, wanted: str) -> bool:
    return "/" not in wanted and label.rsplit("/", 1)[-1].casefold() == wanted.casefold()
