# SPDX-License-Identifier: Apache-2.0
"""OpenAI's interface, which engines speak themselves: its errors, and its description of a model."""

from __future__ import annotations

import json
import time
from http import HTTPStatus

from flashd.client.results import Model
from flashd.errors import FlashdError
from flashd.gateway.dialects.dialect import NoSuchRoute, Refused, status_of

CHAT_PATH, COMPLETION_PATH, EMBEDDING_PATH = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_TYPES = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
_CODES = {404: "model_not_found", 429: "rate_limit_exceeded"}


class OpenAI:
    """The form of errors."""

    def described(self, error: FlashdError) -> dict[str, object]:
        status = status_of(error)
        is_about_model = status == HTTPStatus.NOT_FOUND and not isinstance(error, NoSuchRoute | Refused)
        said = {
            "message": str(error),
            "type": _TYPES.get(status, "server_error"),
            "param": "model" if is_about_model else error.param if isinstance(error, Refused) else None,
            "code": _CODES.get(status) if is_about_model or status != HTTPStatus.NOT_FOUND else None,
        }
        return {"error": said}

    def ending(self, error: FlashdError) -> bytes:
        return f"data: {json.dumps(self.described(error))}\n\n".encode()


def waiting(path: str, model: str, words: str, as_text: bool) -> bytes:
    """A piece of a stream whose answer has not begun: a comment, or text where the path's answers have any."""
    text = f"{words}\n"
    delta: dict[str, object] = {"delta": {"role": "assistant", "content": text}}
    forms: dict[str, tuple[str, dict[str, object]]]
    forms = {CHAT_PATH: ("chat.completion.chunk", delta), COMPLETION_PATH: ("text_completion", {"text": text})}
    if not as_text or path not in forms:
        return f": {words}\n\n".encode()
    kind, said = forms[path]
    choice: dict[str, object] = {"index": 0, **said, "logprobs": None, "finish_reason": None}
    chunk = {"id": "waiting", "object": kind, "created": int(time.time()), "model": model, "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n".encode()


def entry(name: str, model: Model) -> dict[str, object]:
    """A model, or the adapter `name` of one, as GET /v1/models lists it; `flashd` has what OpenAI has no field for."""
    is_adapter = name != model.name
    more = {"residency": model.residency, "active": model.active, "serving": model.serving}
    more |= {"size_bytes": model.size_bytes, "dtype": model.dtype}
    said = {
        "id": name,
        "object": "model",
        "created": model.created_at,
        "owned_by": "flashd",
        "aliases": [] if is_adapter else list(model.aliases),
        "flashd": more,
    }
    said |= {"parent": model.name} if is_adapter else {}  # vLLM's name for it, as the next
    return said | ({"max_model_len": model.context_length} if model.context_length else {})
