# SPDX-License-Identifier: Apache-2.0
"""What each kind of engine does when it is asked, for the page "Use it from your program".

tests/bus/conformance.py asks engines for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

YES, NO = "yes", "no"
_TRANSLATED = "text, translated by the gateway"
_EMBEDS = "models for embeddings"
_RANKS = "models for reranking"
_TEMPLATED = "if its chat template knows them"
_TOOLS = "if told [how](vllm.md#tools) the model calls them"


@dataclass(frozen=True, slots=True)
class Capability:
    """`torch`, `vllm` and `llama` are YES, NO, or the words for when the engine does it."""

    name: str
    asked_by: str
    torch: str
    vllm: str
    llama: str

    def is_done(self, kind: str) -> bool:
        """Tells whether engines of a kind do it at all."""
        return {"torch": self.torch, "vllm": self.vllm, "llama.cpp": self.llama}[kind] != NO


_TABLE = (
    Capability("chat", "`/v1/chat/completions`, `/api/chat`", YES, YES, YES),
    Capability("completion", "`/v1/completions`, `/api/generate`", YES, YES, YES),
    Capability("streaming", "`stream`", YES, YES, YES),
    Capability("repeatable sampling", "`seed`", YES, YES, YES),
    Capability("texts that end the answer", "`stop`", YES, YES, YES),
    Capability("biased tokens", "`logit_bias`", YES, YES, YES),
    Capability("Anthropic's messages", "`/v1/messages`", _TRANSLATED, YES, YES),
    Capability("OpenAI's responses", "`/v1/responses`", _TRANSLATED, YES, YES),
    Capability("tools", "`tools`", NO, _TOOLS, _TEMPLATED),
    Capability("a tool that must be called", "`tool_choice`", NO, _TOOLS, _TEMPLATED),
    Capability("structured output", "`response_format`, `format`", NO, YES, YES),
    Capability("log probabilities", "`logprobs`", NO, YES, YES),
    Capability("log probabilities of the prompt", "`prompt_logprobs`", NO, YES, NO),
    Capability("several answers", "`n`", NO, YES, YES),
    Capability("vision", "`image_url`, `images`", NO, "models that see", NO),
    Capability("transcription", "`/v1/audio/transcriptions`", NO, "models that hear", NO),
    Capability("embeddings", "`/v1/embeddings`, `/api/embed`", "all models", _EMBEDS, _EMBEDS),
    Capability("rerank", "`/v1/rerank`", NO, _EMBEDS, _RANKS),
    Capability("score", "`/v1/score`", NO, _EMBEDS, NO),
    Capability("tokens of a text", "`/tokenize`", NO, YES, YES),
)
CAPABILITIES: Mapping[str, Capability] = {capability.name: capability for capability in _TABLE}
