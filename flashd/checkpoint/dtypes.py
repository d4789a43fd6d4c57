# SPDX-License-Identifier: Apache-2.0
"""How many bits has an element of each dtype that the safetensors format knows?"""

from __future__ import annotations

from collections.abc import Sequence

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def size_of(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None if its elements do not fill whole bytes."""
    bits = BITS[dtype]
    for extent in shape:
        bits *= extent
    return bits // 8 if bits % 8 == 0 else None
