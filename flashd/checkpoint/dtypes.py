# SPDX-License-Identifier: Apache-2.0
"""The dtypes that the safetensors format knows: how large an element is, and what torch calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype. `torch_name` is its attribute of torch, empty if there is none."""

    bits: int
    torch_name: str = ""


DTYPES: Mapping[str, DType] = {
    "F4": DType(4, "float4_e2m1fn_x2"),  # torch counts pairs of them
    "F6_E2M3": DType(6),
    "F6_E3M2": DType(6),
    "BOOL": DType(8, "bool"),
    "U8": DType(8, "uint8"),
    "I8": DType(8, "int8"),
    "F8_E4M3": DType(8, "float8_e4m3fn"),
    "F8_E5M2": DType(8, "float8_e5m2"),
    "F8_E8M0": DType(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz"),
    "I16": DType(16, "int16"),
    "U16": DType(16, "uint16"),
    "F16": DType(16, "float16"),
    "BF16": DType(16, "bfloat16"),
    "I32": DType(32, "int32"),
    "U32": DType(32, "uint32"),
    "F32": DType(32, "float32"),
    "I64": DType(64, "int64"),
    "U64": DType(64, "uint64"),
    "F64": DType(64, "float64"),
    "C64": DType(64, "complex64"),
}
PLAIN_FLOATS = ("BF16", "F16", "F32", "F64")  # weights that are numbers by themselves, without scales


def size_of(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None if its elements do not fill whole bytes."""
    bits = DTYPES[dtype].bits
    for extent in shape:
        bits *= extent
    return bits // 8 if bits % 8 == 0 else None
