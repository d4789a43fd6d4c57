# SPDX-License-Identifier: Apache-2.0
"""What models do when requests ask for it, by their configuration, their chat template and the kind of their engine.

packaging/reference/capabilities.py has the whole table of what each kind of engine does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashd.checkpoint.gguf.traits import SIDE_FILE as GGUF
from flashd.checkpoint.gguf.traits import Traits
from flashd.checkpoint.json_reader import read_json
from flashd.checkpoint.manifest import read_config
from flashd.checkpoint.source.reader import MAX_SIDE_FILE_BYTES
from flashd.daemon.events import Events
from flashd.daemon.lifecycle.settings import Settings
from flashd.durable import read_bytes
from flashd.errors import CorruptCheckpoint, InvalidSource
from flashd.store.catalog import Catalog, Model
from flashd.tasks import Background, Stop, in_thread

log = logging.getLogger(__name__)

_WRITE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # ends of architectures
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_CALLS = "--enable-auto-tool-choice"  # of vLLM, by which it finds calls of tools in answers


@dataclass(frozen=True, slots=True)
class _Traits:
    """What a checkpoint's files say. `has_tools` is whether its chat template tells the model of tools."""

    sees: bool = False
    has_tools: bool = False
    embeds: bool = False  # of a GGUF model, which either writes or embeds


class Capabilities:
    """What each model does. Files of checkpoints are read in the background, once."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        kind_of: Callable[[Model], str],
        background: Background,
        events: Events,
    ) -> None:
        """`kind_of` returns the kind of the engine in which a model serves, or would."""
        self._settings = settings
        self._catalog = catalog
        self._kind_of = kind_of
        self._background = background
        self._events = events
        self._traits: dict[str, _Traits] = {}  # by checkpoint
        events.model_published.subscribe(self._published)
        events.model_removed.subscribe(lambda _: self._forget())

    def start(self) -> None:
        """Begins to read the files of all models."""
        self._background.start(self._read(self._catalog.models()))

    def of(self, model: Model) -> list[str]:
        """Some of: completion, embedding, tools, vision."""
        if model.is_gguf:
            return self._of_gguf(model)
        writes, is_vllm = model.architecture.endswith(_WRITE), self._kind_of(model) == "vllm"
        traits = self._traits.get(model.checkpoint_id, _Traits())
        found = {
            "completion": writes,
            "embedding": not writes or not is_vllm,  # torch engines embed with any model
            "tools": writes and is_vllm and traits.has_tools and self._finds_calls(model),
            "vision": is_vllm and traits.sees,
        }
        return [name for name, does in found.items() if does]

    def _of_gguf(self, model: Model) -> list[str]:
        traits = self._traits.get(model.checkpoint_id, _Traits())
        if traits.embeds:
            return ["embedding"]
        return ["completion", "tools"] if traits.has_tools else ["completion"]

    def _finds_calls(self, model: Model) -> bool:
        settings = self._settings.current
        chosen = settings.model(model.name, *model.aliases).arguments
        return _CALLS in {argument.replace("_", "-") for argument in (*settings.engines.vllm.arguments, *chosen)}

    def _published(self, model: Model) -> None:
        self._forget()  # what it was before
        self._background.start(self._read([model]))

    async def _read(self, models: Sequence[Model]) -> None:
        for model in models:
            if model.checkpoint_id not in self._traits:
                self._traits[model.checkpoint_id] = found = await in_thread(functools.partial(self._found, model))
                if found != _Traits():
                    self._events.model_changed(model.name)
        self._forget()  # what was removed meanwhile

    def _found(self, model: Model, _: Stop) -> _Traits:
        try:
            folder = self._catalog.checkpoint(model.checkpoint_id).directory
        except CorruptCheckpoint as error:
            log.debug("%s", error)
            return _Traits()
        with contextlib.suppress(OSError, InvalidSource):
            gguf = Traits.from_json(read_bytes(folder / GGUF, MAX_SIDE_FILE_BYTES))
            return _Traits(has_tools=gguf.knows_tools, embeds=gguf.embeds)
        sees = False
        with contextlib.suppress(OSError, ValueError, InvalidSource):  # a checkpoint need not have one
            config = read_config(read_bytes(folder / "config.json", MAX_SIDE_FILE_BYTES))
            sees = isinstance(config.get("vision_config"), dict)
        return _Traits(sees, any("tool" in text for text in _templates(folder)))

    def _forget(self) -> None:
        kept = {model.checkpoint_id for model in self._catalog.models()}
        self._traits = {checkpoint: traits for checkpoint, traits in self._traits.items() if checkpoint in kept}


def _templates(folder: Path) -> Iterable[str]:
    """Yields the chat templates in a checkpoint's folder, several of one file as one text."""
    for name in _TEMPLATES:
        with contextlib.suppress(OSError, ValueError, InvalidSource):  # few have all of them
            raw = read_bytes(folder / name, MAX_SIDE_FILE_BYTES)
            if name.endswith(".jinja"):
                yield raw.decode(errors="replace")
            elif isinstance(document := read_json(raw, name), dict):
                yield str(document.get("chat_template", ""))
