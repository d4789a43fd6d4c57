# SPDX-License-Identifier: Apache-2.0
"""flashtensors' Python interface, by flashd: installs as `flashtensors`.

import flashtensors as ft

ft.configure(storage_path="/data/models")
ft.register_model("Qwen/Qwen3-0.6B", backend="vllm")
llm = ft.load_model("Qwen/Qwen3-0.6B", backend="vllm")
outputs = llm.generate(["Who are you?"], SamplingParams(max_tokens=32))

What each function does, and what its arguments mean to flashd, is said where it is defined: `flashd.compat.session` and
`flashd.state_dicts`; README.md beside this file has it at a glance.
"""

from __future__ import annotations

from flashd import __version__
from flashd.compat import flash
from flashd.compat.flash import load_dict, load_dict_non_blocking, save_dict
from flashd.compat.session import (
    activate_vllm_integration,
    cleanup_gpu,
    configure,
    connect,
    get_model_info,
    list_models,
    load_model,
    register_model,
    shutdown_server,
)

__all__ = [
    "__version__",
    "activate_vllm_integration",
    "cleanup_gpu",
    "configure",
    "connect",
    "flash",
    "get_model_info",
    "list_models",
    "load_dict",
    "load_dict_non_blocking",
    "load_model",
    "register_model",
    "save_dict",
    "shutdown_server",
]
