# SPDX-License-Identifier: Apache-2.0
"""Compares the models of `load_model(backend="transformers")` with those that transformers itself loads.

PYTHON tests/engines/modules_compared.py FOLDER     makes small models there, prints a JSON object of findings
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import flashtensors as ft
import torch
import transformers
from transformers import (
    AutoFeatureExtractor,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = 63


def models() -> dict[str, Any]:
    torch.manual_seed(5)
    text = LlamaConfig(**SMALL, vocab_size=64, num_key_value_heads=2)
    vision = CLIPVisionConfig(**SMALL, image_size=28, patch_size=14)
    whisper = WhisperConfig(
        vocab_size=100, num_mel_bins=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, d_model=32, max_source_positions=10,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    moe = Qwen3MoeConfig(**SMALL, vocab_size=64, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
                         moe_intermediate_size=32, head_dim=32)  # fmt: skip
    return {
        "whisper": WhisperForConditionalGeneration(whisper),
        "llava": LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
        ),
        "bert": BertModel(BertConfig(**SMALL, vocab_size=64)),
        "moe": Qwen3MoeForCausalLM(moe),
    }


def inputs(name: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 9, 11, 3]])
    match name:
        case "whisper":
            return {"input_features": torch.linspace(-1, 1, 8 * 20).view(1, 8, 20), "decoder_input_ids": ids}
        case "llava":
            patches = torch.full((1, 4), IMAGE)
            image = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)
            return {"input_ids": torch.cat([ids, patches], 1), "pixel_values": image}
    return {"input_ids": ids}


@torch.no_grad()
def compared(name: str, folder: Path) -> dict[str, Any]:
    mine = ft.load_model(name, backend="transformers")
    plain = type(mine).from_pretrained(folder).eval()
    ours, theirs = mine(**inputs(name)), plain(**inputs(name))
    key = "last_hidden_state" if name == "bert" else "logits"
    half = ft.load_model(name, backend="transformers", torch_dtype="bfloat16", device_map={"": "cpu"})
    first = next(mine.parameters())
    first.add_(1)  # copies the pages: no error, and no effect on others
    again = ft.load_model(name, backend="transformers")
    return {
        "class": type(mine).__name__,
        "equal": torch.equal(ours[key], theirs[key]),
        "dtypes": [str(mine.dtype), str(half.dtype)],
        "training": mine.training,
        "untouched": torch.equal(next(again.parameters()), next(plain.parameters())),
        "auto": type(ft.load_model(name)).__name__,
        "processor": processor_of(name),
    }


def processor_of(name: str) -> str:
    """What makes a model's inputs lies where its information says, beside the weights."""
    info = ft.get_model_info(name)
    assert info is not None
    if not (Path(info["path"]) / "preprocessor_config.json").exists():
        return ""
    return type(AutoFeatureExtractor.from_pretrained(info["path"])).__name__


def main() -> None:
    transformers.logging.set_verbosity_error()
    root = Path(sys.argv[1])
    found = {}
    for name, model in models().items():
        model.save_pretrained(root / name)
        if name == "whisper":
            WhisperFeatureExtractor(feature_size=8).save_pretrained(root / name)
        ft.register_model(str(root / name))
        found[name] = compared(name, root / name)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
