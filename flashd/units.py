# SPDX-License-Identifier: Apache-2.0
"""How sizes and durations are written and read by people."""

from __future__ import annotations

import re

from flashd.errors import InvalidArgument

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

_SUFFIXES = {
    "": 1, "B": 1,
    "K": KiB, "KIB": KiB, "KB": 10**3,
    "M": MiB, "MIB": MiB, "MB": 10**6,
    "G": GiB, "GIB": GiB, "GB": 10**9,
    "T": 1 << 40, "TIB": 1 << 40, "TB": 10**12,
}  # fmt: skip


def format_bytes(size_bytes: int) -> str:
    """Decimal units with three significant digits, as disks and models are sold: `16.4 GB`."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{size_bytes} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def parse_bytes(text: str | int) -> int:
    """`16GB`, `16 GiB`, `512M` (binary, as in systemd) or a plain number of bytes."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _SUFFIXES:
        raise InvalidArgument(f"{text!r} is not a size", hint="write it like 64GB, 512MiB or 1073741824")
    return int(float(match[1]) * _SUFFIXES[match[2].upper()])


def format_seconds(seconds: float) -> str:
    """`0.9 ms`, `58 ms`, `1.25 s`, `2 min 05 s`."""
    if seconds < 0.0095:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
