# SPDX-License-Identifier: Apache-2.0
"""The arguments by which vLLM can apply LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flashd.checkpoint.lora.applied import AppliedAdapter

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the maxima that vLLM accepts


def arguments(adapters: Sequence[AppliedAdapter]) -> Iterator[str]:
    """Yields the arguments with which vLLM has to start so that it can apply these adapters."""
    if adapters:
        largest = max(adapter.rank for adapter in adapters)
        yield from ("--enable-lora", "--max-lora-rank", str(next((r for r in _RANKS if r >= largest), largest)))
        yield from ("--max-cpu-loras", str(len(adapters)))
