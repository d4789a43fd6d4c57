# SPDX-License-Identifier: Apache-2.0
"""How do the bytes of an arena become torch tensors without a copy?

Imports torch only when called: clients that do not ask for tensors do not need it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flashd.checkpoint.header import Header
from flashd.errors import Unsupported

if TYPE_CHECKING:
    import torch

ALIASES = "flashd.aliases"


def torch_tensors(region: memoryview, layout: Header) -> dict[str, torch.Tensor]:
    """Tensors by name over the data region of a checkpoint, tied ones under all their names.

    They keep the region alive and are for reading: writing to one ends the process (SIGSEGV), because the mapping is
    read-only. Raises Unsupported for dtypes that torch has not (F4, F6).
    """
    base = bytes_tensor(region)
    tensors = {}
    for info in layout.tensors:
        raw = base[info.extent.offset : info.extent.end]
        tensors[info.name] = raw.view(_dtype(info.dtype)).view(info.shape)
    tensors |= {alias: tensors[name] for alias, name in aliases(layout).items()}
    return tensors


def bytes_tensor(region: memoryview) -> torch.Tensor:
    """One tensor of bytes over all of a region, sharing its memory."""
    import torch

    if not len(region):
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(region, dtype=torch.uint8)


def aliases(layout: Header) -> Mapping[str, str]:
    """Further name → stored name, of tensors that are stored once."""
    found = json.loads(layout.metadata.get(ALIASES, "{}"))
    return {alias: name for alias, name in found.items() if isinstance(name, str)}


def _dtype(name: str) -> torch.dtype:
    import torch

    known = {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
        "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
        "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    }  # fmt: skip
    if name not in known:
        raise Unsupported(f"torch has no dtype for {name}", hint="read these tensors with the safetensors library")
    return known[name]
