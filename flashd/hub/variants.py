# SPDX-License-Identifier: Apache-2.0
"""Chooses one of the GGUF models of a repository, which has several of different quantisations: OWNER/NAME:Q4_K_M."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath

from flashd.errors import NotFound
from flashd.hub.repository import Revision

_USUAL = "Q4_K_M"  # the one that most programs take, if none is named
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_MOST_SHOWN = 12


def split(repository: str) -> tuple[str, str]:
    """Splits OWNER/NAME:VARIANT. The variant is empty if none is named."""
    name, _, variant = repository.partition(":")
    return name, variant


def chosen(found: Revision, variant: str) -> Revision:
    """Returns the revision with the GGUF files of one variant only, or as it is if it has no others.

    Raises NotFound, with the variants there are, if it has not this one.
    """
    models = [name for name in found.files if name.endswith(".gguf") and "mmproj" not in name.lower()]
    if not variant:
        is_usual = any(name.endswith(".safetensors") for name in found.files) or len({*map(_stem, models)}) < 2
        if is_usual or not _of(models, _USUAL):
            return found
        variant = _USUAL
    names = _of(models, variant)
    if not names:
        said = ", ".join(_variants(models)[:_MOST_SHOWN])
        hint = f"choose one of: {said}" if said else "leave it out: there are no GGUF files"
        raise NotFound(f"{found.repository} has no variant {variant[:80]!r}", hint=hint)
    return replace(found, files={name: found.files[name] for name in names}, variant=variant)


def _of(models: Iterable[str], variant: str) -> list[str]:
    ends = re.compile(rf"(?:^|.*[-._]){re.escape(variant)}", re.IGNORECASE)
    return [name for name in models if ends.fullmatch(_stem(name))]


def _variants(models: Iterable[str]) -> Sequence[str]:
    """Returns what tells the models apart: the ends of their names."""
    return sorted({re.split(r"[-.]", _stem(name))[-1] for name in models})


def _stem(name: str) -> str:
    return _PART.sub("", PurePath(name).stem)
