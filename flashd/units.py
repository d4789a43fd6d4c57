# SPDX-License-Identifier: Apache-2.0
"""Formats and parses sizes and durations for people."""

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
    """Formats a size in decimal units with three significant digits: `16.4 GB`."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{size_bytes} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def parse_bytes(text: str | int) -> int:
    """Parses `16GB`, `16 GiB`, `512M` (binary, as in systemd) or a plain number of bytes. Raises InvalidArgument."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d{1,19}(?:\.\d{1,19})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _SUFFIXES:
        raise InvalidArgument(f"{text[:80]!r} is not a size", hint="write it like 64GB, 512MiB or 1073741824")
    size_bytes = int(float(match[1]) * _SUFFIXES[match[2].upper()])
    if size_bytes >= 2**63:
        raise InvalidArgument(
            f"{text!r} is larger than the memory of any machine", hint="write it like 64GB, 512MiB or 1073741824"
        )
    return size_bytes


def format_seconds(seconds: float) -> str:
    """`0.9 ms`, `58 ms`, `1.25 s`, `2 min 05 s`."""
    if seconds < 0.0095:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
