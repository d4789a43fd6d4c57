# SPDX-License-Identifier: Apache-2.0
"""Ollama's interface: its errors, and its descriptions of models (https://docs.ollama.com/api)."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from flashd.client.results import Engine, Model
from flashd.errors import FlashdError
from flashd.gateway.dialects.dialect import Refused

SPEAKS = "0.12.6"  # the version of Ollama whose interface this is; programs compare it with what they need
_FOREVER = "9999-12-31T23:59:59Z"  # a model serves until another needs its room
_PARAMETER_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# An engine names a parameter as OpenAI does.
_PARAMETERS = {
    "response_format": "format",
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
    "chat_template_kwargs": "think",
    "reasoning_effort": "think",
}


class Ollama:
    """The form of errors."""

    def described(self, error: FlashdError) -> dict[str, object]:
        if not isinstance(error, Refused):
            return {"error": str(error)}
        theirs = _PARAMETERS.get(error.param or "")
        message = str(error).replace("/v1/completions", '/api/generate with "raw": true')
        return {"error": f"{theirs}: {message}" if theirs else message}

    def ending(self, error: FlashdError) -> bytes:
        return line(self.described(error))


def line(content: object) -> bytes:
    """A line of a stream."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"


def tagged(name: str) -> str:
    """A model's name as Ollama lists it; programs take what is after the colon for its tag."""
    return name if ":" in name else f"{name}:latest"


def repository(name: str) -> str:
    """The repository of the hub that a name to pull means: `hf.co/Qwen/Qwen3-0.6B:latest` → `Qwen/Qwen3-0.6B`."""
    return name.removeprefix("https://").removeprefix("hf.co/").removeprefix("huggingface.co/").removesuffix(":latest")


def pulled(repository: str, done_bytes: int, total_bytes: int) -> dict[str, object]:
    """How far a pull is, as /api/pull says it; `total_bytes` is 0 while it is unknown."""
    said: dict[str, object] = {"status": f"pulling {repository}", "digest": repository}
    return said | ({"total": total_bytes, "completed": done_bytes} if total_bytes else {})


def tag(name: str, model: Model) -> dict[str, object]:
    """A model as /api/tags lists it, by its own name or that of one of its adapters."""
    return {
        "name": tagged(name),
        "model": tagged(name),
        "modified_at": timestamp(model.created_at),
        "size": model.size_bytes,
        "digest": model.checkpoint,
        "details": _details(name, model),
    }


def running(model: Model, engine: Engine) -> dict[str, object]:
    """A model that serves, as /api/ps lists it."""
    entry = tag(model.name, model)
    del entry["modified_at"]
    return entry | {"expires_at": _FOREVER, "size_vram": engine.device_bytes}


def shown(name: str, model: Model) -> dict[str, object]:
    """A model, or an adapter by its base, as /api/show describes it.

    What only its engine knows is left out: template and parameters.
    """
    information: dict[str, object] = {"general.architecture": _family(model)}
    if count := _parameter_count(model):
        information["general.parameter_count"] = count
    if model.context_length:
        information[f"{_family(model)}.context_length"] = model.context_length
    return {
        "modelfile": f"FROM {model.name}\n",
        "parameters": "",
        "template": "",
        "details": _details(name, model),
        "model_info": information,
        "capabilities": list(model.capabilities) or ["completion"],  # an older daemon does not say
        "modified_at": timestamp(model.created_at),
    }


def timestamp(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat().replace("+00:00", "Z")


def _details(name: str, model: Model) -> dict[str, object]:
    family, count = _family(model), _parameter_count(model)
    return {
        "parent_model": "" if name == model.name else model.name,
        "format": model.format,
        "family": family,
        "families": [family],
        "parameter_size": _parameter_size(count) if count else "",
        "quantization_level": model.dtype.upper(),
    }


def _family(model: Model) -> str:
    """`Qwen3ForCausalLM` → `qwen3`."""
    return model.architecture.partition("For")[0].removesuffix("Model").lower()


def _parameter_count(model: Model) -> int:
    """The number of parameters, or 0 where it does not follow from the size, as with quantised models."""
    width_bytes = _PARAMETER_BYTES.get(model.dtype)
    return model.size_bytes // width_bytes if width_bytes else 0


def _parameter_size(count: int) -> str:
    """`7.2B`, as Ollama writes it."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
