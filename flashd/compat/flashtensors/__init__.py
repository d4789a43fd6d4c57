# SPDX-License-Identifier: Apache-2.0
"""flashtensors' Python interface, implemented by flashd and installed as `flashtensors`.

import flashtensors as ft

ft.configure(storage_path="/data/models")
ft.register_model("Qwen/Qwen3-0.6B", backend="vllm")
llm = ft.load_model("Qwen/Qwen3-0.6B", backend="vllm")
outputs = llm.generate(["Who are you?"], SamplingParams(max_tokens=32))

The functions and their arguments are documented where they are defined, in `flashd.compat.session` and
`flashd.client.state_dicts`; packaging/docs/migrating.md has an overview.
"""

from __future__ import annotations

from flashd._version import __version__
from flashd.client.state_dicts import load_dict, load_dict_non_blocking, save_dict
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

from . import flash

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
