# SPDX-License-Identifier: Apache-2.0
"""Computes the weights of a base with an adapter merged into it, in a separate process, because that needs torch.

    python -m flashd.checkpoint.lora.worker PLAN_FD OUTPUT_FD LIMITS_JSON MATCHING_S

The plan, written by lora/plan.py, contains numbers of open descriptors. The process imports torch, gives up all
unnecessary privileges (io/sandbox.py), computes in float32 (float64 for float64 weights) part by part, rounds once to
the dtype of the result, and writes one tensor after another. The adapter's data, including its patterns, is parsed only
here.
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
from typing import TypedDict

import torch

from flashd.checkpoint.torch_dtypes import TORCH_DTYPES
from flashd.io import sandbox

PART_BYTES = 32 << 20


class TensorLocation(TypedDict):
    """A tensor in an open file, in the plan's form."""

    fd: int
    offset: int
    dtype: str
    shape: list[int]


class Change(TypedDict):
    """A tensor of the base that the adapter changes by `a` and `b`, in the plan's form."""

    module: str
    kind: str
    dtype: str
    start: TensorLocation
    a: TensorLocation | None
    b: TensorLocation | None


class ScalingConfig(TypedDict):
    """The scales in adapter_config.json, in the plan's form."""

    r: float
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]


class Refused(Exception):
    """Raised if the adapter contradicts itself, with a message for the user."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file."""

    fd: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, described: TensorLocation) -> Tensor:
        return cls(described["fd"], described["offset"], TORCH_DTYPES[described["dtype"]], tuple(described["shape"]))

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Reads rows along the first dimension, in the file's dtype."""
        size_bytes = (end - start) * self.row_elements * self.dtype.itemsize
        if not size_bytes:
            return torch.empty((end - start, *self.shape[1:]), dtype=self.dtype)
        raw = bytearray(size_bytes)
        rest = memoryview(raw)
        offset = self.offset + start * self.row_elements * self.dtype.itemsize
        while rest:
            count = os.preadv(self.fd, [rest], offset)
            if not count:
                raise Refused("a file of weights is truncated")
            rest, offset = rest[count:], offset + count
        return torch.frombuffer(raw, dtype=self.dtype).view(end - start, *self.shape[1:])

    def whole(self) -> torch.Tensor:
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1)


class Scaling:
    """PEFT's scales of modules, from adapter_config.json."""

    def __init__(self, config: ScalingConfig) -> None:
        self._config = config
        self._ranks = _compiled(config["rank_pattern"])
        self._alphas = _compiled(config["alpha_pattern"])

    def of(self, module: str, rank: int | None) -> float:
        """Returns alpha/r, or alpha/√r with rslora (LoraLayer.update_layer)."""
        r = _matched(self._ranks, module, self._config["r"])
        alpha = _matched(self._alphas, module, self._config["lora_alpha"])
        if r <= 0 or (rank is not None and r != rank):
            raise Refused(f"the factors of {module} have rank {rank}, but adapter_config.json says {r:g}")
        return alpha / math.sqrt(r) if self._config["use_rslora"] else alpha / r


Patterns = list[tuple[re.Pattern[str], float]]


def _compiled(patterns: Mapping[str, float]) -> Patterns:
    compiled = []
    for pattern, value in patterns.items():
        try:
            compiled.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except (re.error, RecursionError, OverflowError):
            raise Refused(f"{pattern[:80]!r} in adapter_config.json is not a pattern") from None
    return compiled


def _matched(patterns: Patterns, module: str, otherwise: float) -> float:
    """Returns the value of the first pattern that matches the end of the name (peft.utils.other.get_pattern_key)."""
    return next((value for pattern, value in patterns if pattern.match(module)), otherwise)


def scales(changes: list[Change], config: ScalingConfig, limit_s: float) -> list[float]:
    """Computes the scale of each change.

    Matching a pattern may take practically for ever. After `limit_s` of CPU time, SIGVTALRM ends this process, whatever
    the pattern is doing.
    """
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    scaling = Scaling(config)
    found = [
        scaling.of(change["module"], change["a"]["shape"][0] if change["a"] else None)
        if change["kind"] != "cast"
        else 0.0
        for change in changes
    ]
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return found


def merged(change: Change, scale: float) -> Iterator[torch.Tensor]:
    """Yields the merged tensor in parts along its first dimension."""
    start, dtype, kind = Tensor.of(change["start"]), TORCH_DTYPES[change["dtype"]], change["kind"]
    a, b = (Tensor.of(part) if part else None for part in (change["a"], change["b"]))
    exact = torch.float64 if torch.float64 in {start.dtype, dtype} else torch.float32
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
        factors = scales(plan["changes"], plan["scaling"], float(sys.argv[4]))
        for change, scale in zip(plan["changes"], factors, strict=True):
            for part in merged(change, scale):
                write(output_fd, part)
    except Refused as refusal:
        sys.exit(str(refusal))
    except OSError as error:
        sys.exit(error.errno or 1)


if __name__ == "__main__":
    main()
