# SPDX-License-Identifier: Apache-2.0
"""How does vLLM learn of us? By an entry point of the group vllm.general_plugins, called in each of its processes.

It is called even where nobody wants us, so it only says where the loader is.
"""

from __future__ import annotations

LOAD_FORMAT = "flash"


def register() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from flashd.engines.vllm.loader import FlashLoader

    register_model_loader(LOAD_FORMAT)(FlashLoader)
