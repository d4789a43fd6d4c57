# SPDX-License-Identifier: Apache-2.0
"""Memory use of a server that was started by hand, while other programs use some of the memory.

vLLM requires most of the memory to be free, and refuses to start otherwise. A server without an explicit
`--gpu-memory-utilization` takes the free memory instead.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashd.units import format_bytes

if TYPE_CHECKING:
    from vllm.config import CacheConfig

log = logging.getLogger("vllm.flashd")
_OPTIONS = ("--gpu-memory-utilization", "--gpu_memory_utilization")
_LEFT_PERCENT = 1  # of the memory, left for growth of other programs during the start


def fit(cache_config: CacheConfig, free_bytes: int, total_bytes: int, *, held_bytes: int = 0) -> None:
    """Lowers the utilization to the free memory.

    `held_bytes` is the size of its weights if they are already in memory: they count in its share, but need no free
    memory.
    """
    wanted: float = cache_config.gpu_memory_utilization
    if wanted * total_bytes - held_bytes <= free_bytes:
        return
    percent = math.floor(100 * (free_bytes + held_bytes) / total_bytes) - _LEFT_PERCENT
    if percent <= 0:
        return  # vLLM reports that no memory is free
    others = format_bytes(total_bytes - free_bytes)
    if is_told(cache_config, sys.argv):
        log.error("%s of the memory are in use: --gpu-memory-utilization %.2f would fit", others, percent / 100)
        return
    cache_config.gpu_memory_utilization = percent / 100
    log.warning(
        "%s of the memory are in use by flashd's models or others: --gpu-memory-utilization is %.2f instead of %s",
        others, percent / 100, wanted,
    )  # fmt: skip


def is_told(cache_config: CacheConfig, command_line: Sequence[str]) -> bool:
    """Tells whether the user chose the utilization. Spawned processes have the command line of the first one."""
    is_default = cache_config.gpu_memory_utilization == type(cache_config).gpu_memory_utilization
    return not is_default or any(word.split("=")[0] in _OPTIONS for word in command_line)
