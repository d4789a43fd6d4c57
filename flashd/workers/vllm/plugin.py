# SPDX-License-Identifier: Apache-2.0
"""Registers our loader with vLLM: an entry point of the group vllm.general_plugins, called in each of its processes.

vLLM calls it even if our loader is not used, so it only registers the loader, makes servers that use it take the free
memory, and adds a method to the engine core.
"""

from __future__ import annotations

LOAD_FORMAT = "flash"


def register() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from flashd.workers.vllm import compat, room
    from flashd.workers.vllm.loader import FlashLoader

    register_model_loader(LOAD_FORMAT)(FlashLoader)
    compat.before_memory_is_wanted(room.fit, LOAD_FORMAT)
    compat.answer_is_idle()
