# SPDX-License-Identifier: Apache-2.0
"""Ends parked engines when the machine runs out of memory, the one parked longest ago first.

The memory of a parked engine, for the process with its framework and its GPU context, is counted in no pool. Other
programs may need it more, and the kernel's OOM killer would choose worse.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from flashd.memory.device import memory_fields
from flashd.swap.swapper import Swapper
from flashd.tasks import Routine
from flashd.units import format_bytes

log = logging.getLogger(__name__)

_LOOK_S = 2.0
_SPARE = 64  # one part in so many


class MemoryPressure(Routine):
    """Stops parked engines while too little memory is available."""

    def __init__(
        self,
        swapper: Swapper,
        *,
        spare_bytes: Callable[[], int],
        memory: Callable[[], Mapping[str, int]] = memory_fields,
        look_s: float = _LOOK_S,
    ) -> None:
        """`memory` has the fields of /proc/meminfo, in bytes."""
        super().__init__("memory pressure", self._look)
        self._swapper = swapper
        self._spare_bytes = spare_bytes
        self._memory = memory
        self._look_s = look_s

    async def _look(self) -> None:
        await asyncio.sleep(self._look_s)
        if not self._swapper.has_parked:
            return
        memory = self._memory()
        available_bytes = memory["MemAvailable"]
        if unneeded_bytes(self._spare_bytes(), memory) < 0:
            log.warning("only %s of memory are available, so a parked engine is stopped", format_bytes(available_bytes))
            await self._swapper.stop_parked(at_most=1)


def unneeded_bytes(spare_bytes: int, memory: Mapping[str, int]) -> int:
    """Returns the available memory beyond what parked engines must leave; negative if too little is available.

    `spare_bytes` is the setting engines.spare, and `memory` has the fields of /proc/meminfo, in bytes.
    """
    return memory["MemAvailable"] - (spare_bytes or memory["MemTotal"] // _SPARE)
