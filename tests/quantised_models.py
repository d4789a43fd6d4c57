# SPDX-License-Identifier: Apache-2.0
"""Makes small checkpoints with the common kinds of quantisation from one without.

Values are rounded to the nearest, without calibration, because only the loaders' agreement matters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_GROUP = 32  # inputs per scale
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the order of outputs in one word


def make_quantised(source: Path, folder: Path, method: str) -> Path:
    """`method` is one of METHODS. The linear layers are quantised, and what is tied to the embedding is not."""
    quantise, config = METHODS[method]
    shutil.copytree(source, folder)
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        made = quantise(tensor.float()) if layer.endswith("_proj") else {"weight": tensor}
        tensors |= {f"{layer}.{part}" if layer != name else name: value for part, value in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def _fp8(weight: torch.Tensor) -> Tensors:
    """vLLM's own form: a scale a layer."""
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.reshape(1)}


def _int8(weight: torch.Tensor) -> Tensors:
    """A scale an output, activations in eight bits as well."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale.to(torch.bfloat16)}


def _gptq(weight: torch.Tensor) -> Tensors:
    """Four bits, eight inputs a word; a zero point is stored as one less than it is."""
    values, scales = _four_bits(weight)
    zeros = torch.full(scales.shape, 7)
    groups = torch.arange(weight.shape[1]) // _GROUP
    return {
        "qweight": _words(values.T.reshape(-1, 8, values.shape[0]).transpose(1, 2)),
        "qzeros": _words(zeros.T.reshape(scales.shape[1], -1, 8)),
        "scales": scales.T.to(torch.bfloat16).contiguous(),
        "g_idx": groups.to(torch.int32),
    }


def _awq(weight: torch.Tensor) -> Tensors:
    """Four bits, eight outputs a word, in an order of its own."""
    values, scales = _four_bits(weight)
    zeros = torch.full(scales.shape, 8)
    return {
        "qweight": _words(values.T.reshape(values.shape[1], -1, 8)[..., _AWQ_ORDER]),
        "qzeros": _words(zeros.T.reshape(scales.shape[1], -1, 8)),
        "scales": scales.T.to(torch.bfloat16).contiguous(),
    }


def _packed(weight: torch.Tensor) -> Tensors:
    """Four bits, eight inputs a word, as compressed-tensors packs them."""
    values, scales = _four_bits(weight)
    return {
        "weight_packed": _words(values.reshape(values.shape[0], -1, 8)),
        "weight_scale": scales.to(torch.bfloat16).contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of 0 to 15 around 8, (outputs, inputs), and their scales, (outputs, groups of inputs)."""
    grouped = weight.reshape(weight.shape[0], -1, _GROUP)
    scales = grouped.abs().amax(dim=2) / 7
    values = (grouped / scales[..., None]).round().clamp(-8, 7) + 8
    return values.reshape(weight.shape).to(torch.int64), scales


def _words(values: torch.Tensor) -> torch.Tensor:
    """Eight numbers of four bits, in the last dimension, as one of 32 bits; the first is the lowest."""
    words = (values.to(torch.int64) << torch.arange(0, 32, 4)).sum(dim=-1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32).contiguous()


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
METHODS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "fp8": (_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "compressed-tensors": (
        _int8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "all": {
                    "targets": ["Linear"],
                    "weights": {**_INT8, "strategy": "channel", "dynamic": False},
                    "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
                }
            },
        },
    ),
    "packed": (
        _packed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "all": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": _GROUP,
                        "dynamic": False,
                    },
                }
            },
        },
    ),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True, "version": "gemm"}),
}
