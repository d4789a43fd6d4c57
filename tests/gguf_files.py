# SPDX-License-Identifier: Apache-2.0
"""Writes GGUF files for tests: small models with random weights, which llama.cpp runs, and damaged ones."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashd.checkpoint import header as headers

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
_FORMATS = {UINT16: "<H", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}
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
        "tokenizer.ggml.add_space_prefix": Value(BOOL, False),
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
    """Three control tokens, all bytes, and a space."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    return tokens, [2, 3, 3, *[6] * 256, 1], [0.0] * len(tokens)


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


_QWEN3 = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def qwen3(folder: Path) -> Gguf:
    """The same model as a folder of transformers' Qwen3 in bf16, with its byte-level tokenizer and chat template."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    known = {number: token for token, number in tokenizer["model"]["vocab"].items()} | special
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["model"]["merges"]]
    entries = {
        "general.architecture": Value(STRING, "qwen3"),
        "qwen3.context_length": Value(UINT32, config["max_position_embeddings"]),
        "qwen3.embedding_length": Value(UINT32, config["hidden_size"]),
        "qwen3.block_count": Value(UINT32, config["num_hidden_layers"]),
        "qwen3.feed_forward_length": Value(UINT32, config["intermediate_size"]),
        "qwen3.attention.head_count": Value(UINT32, config["num_attention_heads"]),
        "qwen3.attention.head_count_kv": Value(UINT32, config["num_key_value_heads"]),
        "qwen3.attention.key_length": Value(UINT32, config["head_dim"]),
        "qwen3.attention.value_length": Value(UINT32, config["head_dim"]),
        "qwen3.attention.layer_norm_rms_epsilon": Value(FLOAT32, config["rms_norm_eps"]),
        "qwen3.rope.freq_base": Value(FLOAT32, _rope_base(config)),
        "tokenizer.ggml.model": Value(STRING, "gpt2"),
        "tokenizer.ggml.pre": Value(STRING, "gpt-2"),
        "tokenizer.ggml.tokens": Value(STRING, [known[number] for number in range(len(known))]),
        "tokenizer.ggml.token_type": Value(INT32, [3 if number in special else 1 for number in range(len(known))]),
        "tokenizer.ggml.merges": Value(STRING, merges),
        "tokenizer.ggml.eos_token_id": Value(UINT32, config["eos_token_id"]),
        "tokenizer.chat_template": Value(STRING, (folder / "chat_template.jinja").read_text()),
    }
    made = Gguf(entries)
    with (folder / "model.safetensors").open("rb") as file:
        header = headers.read(file.fileno(), str(folder))
        for tensor in header.tensors:
            file.seek(header.data_offset + tensor.extent.offset)
            raw = file.read(tensor.extent.length)
            kind = BF16 if len(tensor.shape) > 1 else F32
            if kind == F32:  # llama.cpp wants those of norms so; bf16 is the upper half of it
                raw = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).tobytes()
            made.tensors[_of_qwen3(tensor.name)] = (kind, tensor.shape[::-1], raw)
    return made


def _of_qwen3(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`."""
    inner = name.removesuffix(".weight")
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", inner):
        return f"blk.{layer[1]}.{_QWEN3[layer[2]]}.weight"
    return f"{_QWEN3[inner]}.weight"


def _rope_base(config: Mapping[str, Any]) -> float:
    return float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
