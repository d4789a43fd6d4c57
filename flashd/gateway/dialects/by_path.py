# SPDX-License-Identifier: Apache-2.0
"""Which dialect a path belongs to."""

from __future__ import annotations

from flashd.gateway.dialects.anthropic import Anthropic
from flashd.gateway.dialects.dialect import Dialect
from flashd.gateway.dialects.flashd import Flashd
from flashd.gateway.dialects.ollama import Ollama
from flashd.gateway.dialects.openai import OpenAI


def dialect_of(path: str) -> Dialect:
    if path == "/api" or path.startswith("/api/"):
        return Ollama()
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return Anthropic()
    if path.startswith("/flashd/"):
        return Flashd()
    return OpenAI()
