# SPDX-License-Identifier: Apache-2.0
"""Pools the hidden states of a text into one vector, as declared in the modules.json of sentence-transformers.

A wrong pooling would produce wrong vectors unnoticed, so declarations that cannot be read or carried out are
Unsupported. The config of a pooling is in a folder below the model's, 1_Pooling/config.json; checkpoints keep it as
1_Pooling.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flashd.checkpoint.json_reader import read_json
from flashd.errors import InvalidSource, Unsupported

MODULES = "modules.json"
_PROMPTS, _LENGTH = "config_sentence_transformers.json", "sentence_bert_config.json"
_KNOWN = {"Transformer", "Pooling", "Normalize"}
# In the order in which several modes are concatenated, with their names in newer versions.
_MODES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_AGAIN = "import the model again, with all of its folders"

ReadFile = Callable[[str], bytes | None]


@dataclass(frozen=True, slots=True)
class Pooling:
    """A pooling. Its `modes` are concatenated in order, `prompt` precedes each text, and `max_tokens` is the model's
    limit.
    """

    modes: tuple[str, ...] = ("mean",)
    normalizes: bool = True
    max_tokens: int | None = None
    lowercases: bool = False
    prompt: str = ""


def declared(read_file: ReadFile) -> Pooling | None:
    """Reads the declaration; None if there is none. `read_file` returns the content of a side file, or None.

    Raises Unsupported for declarations that cannot be carried out.
    """
    modules = _json(read_file, MODULES)
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise Unsupported(f"{MODULES} is not a list of modules")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if other := [kind for kind in kinds if kind not in _KNOWN]:
        raise Unsupported(f"its embeddings pass through {other[0][:80]!r} ({MODULES}), which no engine here supports")
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise Unsupported(f"{MODULES} combines modules in a way that no engine supports: {', '.join(kinds)[:200]}")
    path = str(modules[1].get("path", ""))
    pooling = _json(read_file, f"{path}.json") if "/" not in path else None
    if not isinstance(pooling, dict):
        raise Unsupported(f"{MODULES} declares a pooling, but {path[:80]}/config.json is missing", hint=_AGAIN)
    length = _table(read_file, _LENGTH)
    prompt = _prompt(_table(read_file, _PROMPTS))
    if prompt and pooling.get("include_prompt") is False:
        raise Unsupported("its pooling excludes the prompt, which no engine here supports")
    max_tokens = length.get("max_seq_length")
    return Pooling(
        _modes(pooling, path),
        "Normalize" in kinds,
        max_tokens if isinstance(max_tokens, int) and max_tokens > 0 else None,
        length.get("do_lower_case") is True,
        prompt,
    )


def _prompt(settings: Mapping[str, object]) -> str:
    """Returns the default prompt before each text; empty if there is none."""
    prompts, name = settings.get("prompts"), settings.get("default_prompt_name")
    found = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    return found if isinstance(found, str) else ""


def _modes(pooling: Mapping[str, object], path: str) -> tuple[str, ...]:
    named = pooling.get("pooling_mode")
    modes = tuple(named) if isinstance(named, list) else (named,) if isinstance(named, str) else ()
    modes = modes or tuple(mode for name, mode in _MODES.items() if pooling.get(name) is True)
    others = [mode for mode in modes if mode not in _MODES.values()]
    others += [
        name for name, value in pooling.items() if "pooling_mode_" in name and value is True and name not in _MODES
    ]
    if others or not modes:
        what = f"the pooling {str(others[0])[:80]!r}" if others else "no pooling"
        raise Unsupported(f"{path}/config.json declares {what}, which no engine here supports")
    return modes


def _table(read_file: ReadFile, name: str) -> Mapping[str, object]:
    found = _json(read_file, name)
    return found if isinstance(found, dict) else {}


def _json(read_file: ReadFile, name: str) -> object:
    raw = read_file(name)
    if raw is None:
        return None
    try:
        return read_json(raw, name, constants=True)
    except InvalidSource as error:
        raise Unsupported(error.message, hint=error.hint) from None
