# SPDX-License-Identifier: Apache-2.0
"""Writes GGUF files for tests: small models with random weights, which llama.cpp runs, and damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

F32, F16, Q8_0 = 0, 1, 8
UINT16, UINT32, INT32, FLOAT32, STRING, ARRAY = 2, 4, 5, 6, 8, 9
_FORMATS = {UINT16: "<H", UINT32: "<I", INT32: "<i", FLOAT32: "<f"}
_LETTERS = b"abcdefghijklmnopqrstuvwxyz ."
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the metadata with its type; a list is an array of that type."""

    kind: int
    value: Any

    def packed(self) -> bytes:
        if isinstance(self.value, list):
            items = b"".join(_scalar(self.kind, item) for item in self.value)
            return struct.pack("<IIQ", ARRAY, self.kind, len(self.value)) + items
        return struct.pack("<I", self.kind) + _scalar(self.kind, self.value)


@dataclass(slots=True)
class Gguf:
    """The content of a file. Tensors are by name: the type, the shape beginning with the length of a row, the data."""

    entries: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = field(default_factory=dict)
    alignment: int = 32

    def packed(self, *, version: int = 3) -> bytes:
        described, data = b"", b""
        for name, (kind, shape, raw) in self.tensors.items():
            place = struct.pack("<IQ", kind, len(data))
            described += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + place
            data += raw + bytes(-len(raw) % self.alignment)
        entries = b"".join(_text(key) + value.packed() for key, value in self.entries.items())
        head = b"GGUF" + struct.pack("<IQQ", version, len(self.tensors), len(self.entries)) + entries + described
        return head + bytes(-len(head) % self.alignment) + data

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.packed())
        return path

    def parts(self, count: int) -> list[Gguf]:
        """Splits it like llama-gguf-split."""
        names = list(self.tensors)
        step = -(-len(names) // count)
        made = []
        for number in range(count):
            entries = {
                **(self.entries if not number else {}),
                "split.no": Value(UINT16, number),
                "split.count": Value(UINT16, count),
                "split.tensors.count": Value(INT32, len(names)),
            }
            mine = {name: self.tensors[name] for name in names[number * step : (number + 1) * step]}
            made.append(Gguf(entries, mine, self.alignment))
        return made

    def write_parts(self, folder: Path, stem: str, count: int) -> list[Path]:
        return [
            part.write(folder / f"{stem}-{number:05}-of-{count:05}.gguf")
            for number, part in enumerate(self.parts(count), 1)
        ]


def llama(
    seed: int,
    *,
    name: str = "tiny",
    matrices: int = F32,
    architecture: str = "llama",
    template: str = TEMPLATE,
    context: int = 512,
    pooling: int = 0,
) -> Gguf:
    """A Llama of 0.2 million parameters, which answers in small letters. `matrices` is the type of its matrices."""
    width, heads, layers, inner = 64, 2, 2, 96
    vocabulary, kinds, scores = _vocabulary()
    random = np.random.default_rng(seed)
    entries = {
        "general.architecture": Value(STRING, architecture),
        "general.name": Value(STRING, name),
        f"{architecture}.context_length": Value(UINT32, context),
        f"{architecture}.embedding_length": Value(UINT32, width),
        f"{architecture}.block_count": Value(UINT32, layers),
        f"{architecture}.feed_forward_length": Value(UINT32, inner),
        f"{architecture}.attention.head_count": Value(UINT32, heads),
        f"{architecture}.attention.layer_norm_rms_epsilon": Value(FLOAT32, 1e-5),
        "tokenizer.ggml.model": Value(STRING, "llama"),
        "tokenizer.ggml.tokens": Value(STRING, vocabulary),
        "tokenizer.ggml.scores": Value(FLOAT32, scores),
        "tokenizer.ggml.token_type": Value(INT32, kinds),
        "tokenizer.ggml.bos_token_id": Value(UINT32, 1),
        "tokenizer.ggml.eos_token_id": Value(UINT32, 2),
    }
    if template:
        entries["tokenizer.chat_template"] = Value(STRING, template)
    if pooling:
        entries[f"{architecture}.pooling_type"] = Value(UINT32, pooling)
    made = Gguf(entries)

    def matrix(of: str, row: int, rows: int, *, only: Sequence[int] | None = None) -> None:
        values = random.normal(0, 0.2, (rows, row)).astype(np.float32)
        if only is not None:  # others are never likeliest
            values[[number for number in range(rows) if number not in only]] = 0
        made.tensors[of] = (matrices, (row, rows), _as(matrices, values))

    def norm(of: str) -> None:
        made.tensors[of] = (F32, (width,), np.ones(width, np.float32).tobytes())

    matrix("token_embd.weight", width, len(vocabulary))
    for number in range(layers):
        block = f"blk.{number}"
        norm(f"{block}.attn_norm.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{block}.{part}.weight", width, width)
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.ffn_gate.weight", width, inner)
        matrix(f"{block}.ffn_up.weight", width, inner)
        matrix(f"{block}.ffn_down.weight", inner, width)
    norm("output_norm.weight")
    matrix("output.weight", width, len(vocabulary), only=[3 + letter for letter in _LETTERS])
    return made


def _vocabulary() -> tuple[list[str], list[int], list[float]]:
    """Three control tokens, then all bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokens, [2, 3, 3, *[6] * 256], [0.0] * len(tokens)


def _as(kind: int, values: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    if kind == F32:
        return values.tobytes()
    if kind == F16:
        return values.astype(np.float16).tobytes()
    blocks = values.reshape(-1, 32)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127 + 1e-9
    quantised = np.round(blocks / scales).astype(np.int8)
    return b"".join(
        scale.astype(np.float16).tobytes() + block.tobytes() for scale, block in zip(scales, quantised, strict=True)
    )


def _scalar(kind: int, value: Any) -> bytes:
    return _text(value) if kind == STRING else struct.pack(_FORMATS[kind], value)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
