# SPDX-License-Identifier: Apache-2.0
"""Makes models of random weights in the shape of Qwen3-8B, which loaders take for fine-tunes of each other.

    python tests/bench/random_models.py FOLDER NAME... [--layers 36] [--hidden 4096]

All layers make 16.4 GB, in shards of 2 GB; five are 4.4 GB. A name always gives the same weights, and all
have one small tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

SHARD_BYTES = 2 * 10**9
# The tokenizer's training text. Other text would make models that differ from existing ones.
TEXT = "Hello, who are you? I am a model that was made of random numbers, and nothing that I say means anything. " * 8
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(folder: Path, layers: int, hidden: int) -> Qwen3Config:
    """Everything but weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0])
    saved.chat_template = TEMPLATE
    saved.save_pretrained(folder)
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512), head_dim=128, vocab_size=151_936, max_position_embeddings=40_960,
        rope_theta=1e6, tie_word_embeddings=False, rms_norm_eps=1e-6, eos_token_id=2,
        architectures=["Qwen3ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    return config


def shapes_of(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    hidden, inner, wide = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = {
        "self_attn.q_proj": (wide, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, wide), "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    vocabulary = (config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary}
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": vocabulary}


def shards_of(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size_bytes = 0
    for name, shape in shapes.items():
        if size_bytes >= SHARD_BYTES:
            shards.append([])
            size_bytes = 0
        shards[-1].append(name)
        size_bytes += 2 * torch.Size(shape).numel()
    return shards


def make_shard(file: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = options.folder / ".base"
    shapes = shapes_of(make_base(base, options.layers, options.hidden))
    shards = shards_of(shapes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = []
        for name in options.names:
            made = shutil.copytree(base, options.folder / name)
            index = {}
            for number, shard in enumerate(shards, 1):
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
                index |= dict.fromkeys(shard, file)
                seed = zlib.crc32(f"{name} {number}".encode())
                work.append(pool.submit(make_shard, made / file, {tensor: shapes[tensor] for tensor in shard}, seed))
            (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for done in work:
            done.result()
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
