# SPDX-License-Identifier: Apache-2.0
"""Default sampling of a model, from its generation_config.json, as far as this engine supports it.

Supported are end tokens, in addition to the tokenizer's; the settings that vLLM takes as defaults of a request; stop
texts; and the logits processors of transformers that need one line here. Other search methods (beams, contrastive,
assisted, ...) are ignored, as by vLLM, because streamed answers cannot be taken back. Invalid values are ignored too,
and logged.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashd import json_values
from flashd.json_values import Read, WrongValue
from flashd.workers.drawing import draws
from flashd.workers.torch import fields
from flashd.workers.torch.fields import is_token
from flashd.workers.torch.requests import Sampling


def _token(value: object) -> int:
    if not is_token(value):
        raise WrongValue("must be a token id")
    return int(value)


def _tokens(value: object) -> list[int]:
    return list(fields.token_ids(value))


def _words(value: object) -> list[list[int]]:
    if not isinstance(value, list) or not all(isinstance(word, list) and word for word in value):
        raise WrongValue("must be lists of token ids")
    return [_tokens(word) for word in value]


# Carried out by transformers' own processors, as the authors of models expect; each alone, on one sequence.
_OF_TRANSFORMERS: Mapping[str, Read] = {
    "bos_token_id": _token,
    "decoder_start_token_id": _token,
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _tokens,
    "suppress_tokens": _tokens,
    "begin_suppress_tokens": _tokens,
    "bad_words_ids": _words,
    "no_repeat_ngram_size": json_values.whole(0, 1000),
    "encoder_no_repeat_ngram_size": json_values.whole(0, 1000),
    "encoder_repetition_penalty": json_values.number(0.01, 100.0),
    "min_new_tokens": json_values.whole(0, fields.MAX_TOKENS),
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """Defaults of a model.

    `sampling` has the defaults of a request; `options` are for transformers' GenerationConfig.
    """

    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    options: Mapping[str, object] = field(default_factory=dict)


def read(settings: Mapping[str, object], tokenizer: object) -> Defaults:
    """Reads the defaults from a generation_config.json and the model's tokenizer, if any."""

    def sound(name: str, check: Read) -> Any:
        value = settings.get(name)
        try:
            return None if value is None else check(value)
        except WrongValue as error:
            print(f"generation_config.json: {name} is ignored: it {error}", file=sys.stderr, flush=True)
            return None

    sampling = {name: value for name, check in fields.SAMPLING.items() if (value := sound(name, check)) is not None}
    if not draws({**sampling, "do_sample": sound("do_sample", json_values.flag)}):
        sampling["temperature"] = 0.0
    if (limit := sound("max_new_tokens", json_values.whole(1, fields.MAX_TOKENS))) is not None:
        sampling["max_tokens"] = limit
    ends = set(sound("eos_token_id", _tokens) or ())
    if is_token(end := getattr(tokenizer, "eos_token_id", None)):
        ends.add(end)
    options = {name: value for name, check in _OF_TRANSFORMERS.items() if (value := sound(name, check)) is not None}
    return Defaults(Sampling(**sampling, stop=sound("stop_strings", fields.stops) or ()), frozenset(ends), options)
