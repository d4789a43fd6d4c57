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
_TOOLS = "if told [how](vllm.md#tools) the model calls them"


@dataclass(frozen=True, slots=True)
class Capability:
    """`torch` and `vllm` are YES, NO, or the words for when the engine does it."""

    name: str
    asked_by: str
    torch: str
    vllm: str

    def is_done(self, kind: str) -> bool:
        """Tells whether engines of a kind do it at all."""
        return {"torch": self.torch, "vllm": self.vllm}[kind] != NO


_TABLE = (
    Capability("chat", "`/v1/chat/completions`, `/api/chat`", YES, YES),
    Capability("completion", "`/v1/completions`, `/api/generate`", YES, YES),
    Capability("streaming", "`stream`", YES, YES),
    Capability("repeatable sampling", "`seed`", YES, YES),
    Capability("texts that end the answer", "`stop`", YES, YES),
    Capability("biased tokens", "`logit_bias`", YES, YES),
    Capability("Anthropic's messages", "`/v1/messages`", _TRANSLATED, YES),
    Capability("OpenAI's responses", "`/v1/responses`", _TRANSLATED, YES),
    Capability("tools", "`tools`", NO, _TOOLS),
    Capability("a tool that must be called", "`tool_choice`", NO, _TOOLS),
    Capability("structured output", "`response_format`, `format`", NO, YES),
    Capability("log probabilities", "`logprobs`", NO, YES),
    Capability("log probabilities of the prompt", "`prompt_logprobs`", NO, YES),
    Capability("several answers", "`n`", NO, YES),
    Capability("vision", "`image_url`, `images`", NO, "models that see"),
    Capability("transcription", "`/v1/audio/transcriptions`", NO, "models that hear"),
    Capability("embeddings", "`/v1/embeddings`, `/api/embed`", "all models", _EMBEDS),
    Capability("rerank", "`/v1/rerank`", NO, _EMBEDS),
    Capability("score", "`/v1/score`", NO, _EMBEDS),
    Capability("tokens of a text", "`/tokenize`", NO, YES),
)
CAPABILITIES: Mapping[str, Capability] = {capability.name: capability for capability in _TABLE}
