# SPDX-License-Identifier: Apache-2.0
"""Holds a hundred models on one machine and switches between them while you watch.

import flashd

with flashd.connect() as client:
    client.swap("Qwen/Qwen3-0.6B")
    print(client.chat("Qwen/Qwen3-0.6B", [{"role": "user", "content": "Who are you?"}]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashd import errors
from flashd.errors import FlashdError

if TYPE_CHECKING:
    from flashd.client import Client, Engine, Job, Lease, Model, Status, SwapOutcome
    from flashd.compat import flash
    from flashd.compat.session import (
        activate_vllm_integration,
        cleanup_gpu,
        configure,
        get_model_info,
        list_models,
        load_model,
        register_model,
        shutdown_server,
    )
    from flashd.state_dicts import load_dict, load_dict_non_blocking, save_dict

__version__ = "0.1.0"
__all__ = [
    "Client",
    "Engine",
    "FlashdError",
    "Job",
    "Lease",
    "Model",
    "Status",
    "SwapOutcome",
    "__version__",
    "activate_vllm_integration",
    "cleanup_gpu",
    "configure",
    "connect",
    "errors",
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
_STATE_DICTS = {"load_dict", "load_dict_non_blocking", "save_dict"}
# flashtensors' interface, which is here under the same names: flashd/compat.
_FAMILIAR = {
    "activate_vllm_integration", "cleanup_gpu", "configure", "get_model_info", "list_models", "load_model",
    "register_model", "shutdown_server",
}  # fmt: skip


def connect(
    address: str | None = None,
    *,
    server_host: str | None = None,  # noqa: ARG001
    server_port: int | None = None,  # noqa: ARG001
) -> Client:
    """A client of the daemon at `address` (`session`, `system` or a D-Bus address).

    By default: $FLASHD_BUS_ADDRESS if it is set, else the first of the private bus that `flash start` made, the session
    bus and the system bus that has a flashd. Raises Unavailable if none has. `server_host` and `server_port` are
    flashtensors', and mean nothing: flashd listens on no network.
    """
    from flashd import client

    return client.connect(address)


def __getattr__(name: str) -> Any:
    """What takes longer to import, when first asked for: importing flashd itself takes a few milliseconds."""
    if name in _STATE_DICTS:
        from flashd import state_dicts

        return getattr(state_dicts, name)
    if name in _FAMILIAR:
        from flashd.compat import session

        return getattr(session, name)
    if name == "flash":
        from flashd.compat import flash

        return flash
    if name in __all__:
        from flashd import client

        return getattr(client, name)
    raise AttributeError(f"module 'flashd' has no attribute {name!r}")
