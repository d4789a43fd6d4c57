# SPDX-License-Identifier: Apache-2.0
"""What are the weights of a base with an adapter merged into it? A process of its own, because answering needs torch.

    python -m flashd.checkpoint.merge PLAN_FD OUTPUT_FD LIMITS_JSON

The plan (flashd/checkpoint/merging.py writes it) names open descriptors. It imports torch, gives up everything that it
does not need (flashd/sandbox.py), computes a part at a time in float32 (float64 for weights that are), rounds once to
the dtype of the result, and writes tensor behind tensor. What the adapter says, its patterns among it, is read in here.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flashd import sandbox

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PART_BYTES = 32 << 20


class Refused(Exception):
    """The adapter contradicts itself; the message says how, for the user."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file."""

    fd: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Tensor:
        return cls(described["fd"], described["offset"], DTYPES[described["dtype"]], tuple(described["shape"]))

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Along the first dimension, in the file's dtype."""
        size_bytes = (end - start) * self.row_elements * self.dtype.itemsize
        if not size_bytes:
            return torch.empty((end - start, *self.shape[1:]), dtype=self.dtype)
        raw = bytearray(size_bytes)
        rest = memoryview(raw)
        offset = self.offset + start * self.row_elements * self.dtype.itemsize
        while rest:
            count = os.preadv(self.fd, [rest], offset)
            if not count:
                raise Refused("a file of weights is cut short")
            rest, offset = rest[count:], offset + count
        return torch.frombuffer(raw, dtype=self.dtype).view(end - start, *self.shape[1:])

    def whole(self) -> torch.Tensor:
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1)


def scale_of(module: str, rank: int | None, config: Mapping[str, Any]) -> float:
    """What PEFT scales the factors of a module by: alpha/r, or alpha/√r with rslora (LoraLayer.update_layer)."""
    r = _matched(config["rank_pattern"], module, config["r"])
    alpha = _matched(config["alpha_pattern"], module, config["lora_alpha"])
    if r <= 0 or (rank is not None and r != rank):
        raise Refused(f"the factors of {module} have rank {rank}, and adapter_config.json says {r:g}")
    return alpha / math.sqrt(r) if config["use_rslora"] else alpha / r


def _matched(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """The first pattern that the end of the module's name matches (peft.utils.other.get_pattern_key)."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise Refused(f"{pattern!r} in adapter_config.json is not a pattern") from None
    return otherwise


def merged(change: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensor in parts along its first dimension."""
    start, dtype, kind = Tensor.of(change["start"]), DTYPES[change["dtype"]], change["kind"]
    a, b = (Tensor.of(change[part]) if change[part] else None for part in ("a", "b"))
    exact = torch.float64 if torch.float64 in {start.dtype, dtype} else torch.float32
    scale = scale_of(change["module"], a.shape[0] if a else None, config) if kind != "cast" else 0.0
    left = right = None
    if a and b:
        # Rows of the result are rows of B times A, or rows of Aᵀ times Bᵀ.
        factor_a, factor_b = a.whole().to(exact), b.whole().to(exact)
        left, right = (factor_b, factor_a) if kind == "linear" else (factor_a.T, factor_b.T)
    elif b:
        left = b.whole().to(exact)
    count = start.shape[0] if start.shape else 1
    step = max(1, PART_BYTES // max(1, start.row_elements * exact.itemsize))
    for first in range(0, count, step):
        last = min(count, first + step)
        part = start.rows(first, last).to(exact)
        if left is not None:
            delta = left[first:last] @ right if right is not None else left[first:last]
            part += delta * scale
        yield part.to(dtype)


def write(fd: int, part: torch.Tensor) -> None:
    part = part.contiguous()
    rest = memoryview((ctypes.c_char * part.nbytes).from_address(part.data_ptr())).cast("B")
    while len(rest):
        rest = rest[os.write(fd, rest) :]


def main() -> None:
    plan_fd, output_fd = (int(fd) for fd in sys.argv[1:3])
    sandbox.restrict(sandbox.Limits(**json.loads(sys.argv[3])), sockets=False)
    sandbox.end_with_parent(signal.SIGKILL)
    with os.fdopen(plan_fd, "rb") as file:
        plan = json.load(file)
    try:
        for change in plan["changes"]:
            for part in merged(change, plan["scaling"]):
                write(output_fd, part)
    except Refused as refusal:
        sys.exit(str(refusal))
    except OSError as error:
        sys.exit(error.errno or 1)


if __name__ == "__main__":
    main()
