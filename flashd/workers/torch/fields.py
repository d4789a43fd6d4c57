# SPDX-License-Identifier: Apache-2.0
"""The table of all fields of requests, with their values and effects.

A field that is not in the table is refused by name, because it might change the answer. A null field counts as absent.
A field that this engine does not support is in the table with the values that have no effect, and refused with others.
The model's own generation_config.json is read by the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from flashd.json_values import Read, WrongValue, anything, flag, is_whole, number, only, text, vllm_only, whole

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_BIASES = 1024
MAX_INPUTS = 256
MAX_TOKENS = (1 << 31) - 1
_INT64 = 1 << 63

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_GENERATION = frozenset({CHAT, COMPLETION})
_ALL = frozenset({CHAT, COMPLETION, EMBEDDING})


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a request. `does` documents its effect."""

    name: str
    paths: frozenset[str]
    read: Read
    does: str


def raw(value: object) -> object:
    """Accepts all values, which are checked elsewhere."""
    return value


def stops(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in texts)
    ):
        raise WrongValue(f"must be a text or up to {MAX_STOPS} texts, of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(texts)


def token_ids(value: object) -> tuple[int, ...]:
    ids = [value] if is_whole(value) else value
    if not isinstance(ids, list) or not all(is_token(token) for token in ids):
        raise WrongValue("must be a list of token ids")
    return tuple(ids)


def biases(value: object) -> dict[int, float]:
    bias = number(-100.0, 100.0)
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise WrongValue(f"must be an object from up to {MAX_BIASES} token ids to numbers from -100 to 100")
    if not all(isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10 for token in value):
        raise WrongValue("must have token ids as its names")
    return {int(token): bias(amount) for token, amount in value.items()}


def options(value: object) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(v, bool | int | float | str) for v in value.values()):
        raise WrongValue("must be an object of plain values")
    return value


def stream_options(value: object) -> bool:
    """Tells whether the usage is requested."""
    known = {"include_usage": flag, "include_obfuscation": flag, "continuous_usage_stats": only(False)}
    if not isinstance(value, dict) or not value.keys() <= known.keys():
        raise WrongValue(f"must be an object of {', '.join(known)}")
    read = {name: known[name](given) for name, given in value.items() if given is not None}
    return bool(read.get("include_usage"))


def is_token(value: object) -> TypeGuard[int]:
    return is_whole(value) and 0 <= value < 1 << 31


# Fields that the model's own generation_config.json may set too, as in vLLM.
SAMPLING: Mapping[str, Read] = {
    "temperature": number(0.0, 100.0),
    "top_p": number(0.0, 1.0),
    "top_k": whole(-1, _INT64),
    "min_p": number(0.0, 1.0),
    "repetition_penalty": number(0.01, 100.0),
    "presence_penalty": number(-2.0, 2.0),
    "frequency_penalty": number(-2.0, 2.0),
}
_NOT_DONE = "not supported by this engine; vLLM supports more"
_HARMLESS = "for the bookkeeping of services; no effect here"

_TABLE = (
    Field("model", _ALL, text, "name of the model; empty for the active one"),
    Field("messages", frozenset({CHAT}), raw, "the conversation"),
    Field("prompt", frozenset({COMPLETION}), raw, "a text, or a list of token ids"),
    Field("input", frozenset({EMBEDDING}), raw, "a text, a list of token ids, or a list of either"),
    *(Field(name, _GENERATION, read, "as in vLLM") for name, read in SAMPLING.items()),
    Field("max_tokens", _GENERATION, whole(1, MAX_TOKENS), "most tokens to generate; the context is a limit too"),
    Field("max_completion_tokens", _GENERATION, whole(1, MAX_TOKENS), "the newer name of max_tokens, takes precedence"),
    Field("min_tokens", _GENERATION, whole(0, MAX_TOKENS), "fewest tokens to generate"),
    Field("seed", _GENERATION, whole(-_INT64, _INT64 - 1), "seed of the random numbers, for repeatable answers"),
    Field("stop", _GENERATION, stops, "texts that end the answer, and are not included in it"),
    Field("stop_token_ids", _GENERATION, token_ids, "tokens that end the answer"),
    Field("ignore_eos", _GENERATION, flag, "continues after the model's end token"),
    Field("logit_bias", _GENERATION, biases, "added to the logits of these tokens"),
    Field("skip_special_tokens", _GENERATION, flag, "whether to omit special tokens from the text; default true"),
    Field("return_token_ids", _GENERATION, flag, "adds the token ids of prompt and answer"),
    Field("add_special_tokens", _GENERATION, flag, "whether to add special tokens; true for texts, not for chats"),
    Field("stream", _GENERATION, flag, "streams the answer as server-sent events"),
    Field("stream_options", _GENERATION, stream_options, "include_usage adds a last event with the usage"),
    Field("chat_template_kwargs", frozenset({CHAT}), options, "variables of the chat template"),
    Field("encoding_format", frozenset({EMBEDDING}), raw, "float, or base64 of little-endian float32"),
    Field("dimensions", frozenset({EMBEDDING}), whole(1, MAX_TOKENS), "length of the vectors, if the model allows it"),
    Field("n", _GENERATION, vllm_only(1), _NOT_DONE),
    Field("best_of", _GENERATION, only(1), _NOT_DONE),
    Field("use_beam_search", _GENERATION, vllm_only(False), _NOT_DONE),
    Field("echo", _GENERATION, vllm_only(False), _NOT_DONE),
    Field("suffix", frozenset({COMPLETION}), vllm_only(""), _NOT_DONE),
    Field("logprobs", _GENERATION, vllm_only(False), _NOT_DONE),
    Field("top_logprobs", frozenset({CHAT}), vllm_only(0), _NOT_DONE),
    Field("prompt_logprobs", _GENERATION, vllm_only(), _NOT_DONE),
    Field("response_format", _GENERATION, vllm_only({"type": "text"}), _NOT_DONE),
    Field("tools", frozenset({CHAT}), vllm_only([]), _NOT_DONE),
    Field("tool_choice", frozenset({CHAT}), only("none", "auto"), "there are no tools to choose from"),
    Field("parallel_tool_calls", frozenset({CHAT}), flag, "there are no tools to call"),
    Field("functions", frozenset({CHAT}), only([]), _NOT_DONE),
    Field("function_call", frozenset({CHAT}), only("none", "auto"), "there are no functions to call"),
    Field("modalities", frozenset({CHAT}), vllm_only(["text"]), _NOT_DONE),
    Field("bad_words", _GENERATION, vllm_only([]), _NOT_DONE),
    Field("include_stop_str_in_output", _GENERATION, vllm_only(False), _NOT_DONE),
    Field("spaces_between_special_tokens", _GENERATION, vllm_only(True), _NOT_DONE),
    Field("add_generation_prompt", frozenset({CHAT}), vllm_only(True), _NOT_DONE),
    Field("continue_final_message", frozenset({CHAT}), vllm_only(False), _NOT_DONE),
    *(
        Field(name, _ALL, anything, _HARMLESS)
        for name in ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                     "prompt_cache_retention", "prediction", "priority", "request_id", "cache_salt")
    ),
)  # fmt: skip
TABLE: Mapping[str, Field] = {field.name: field for field in _TABLE}
