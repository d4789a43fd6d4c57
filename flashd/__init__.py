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
    from flashd.compat.session import load_model, register_model
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
    "connect",
    "errors",
    "load_dict",
    "load_dict_non_blocking",
    "load_model",
    "register_model",
    "save_dict",
]
_STATE_DICTS = {"load_dict", "load_dict_non_blocking", "save_dict"}
_MODELS = {"load_model", "register_model"}


def connect(address: str | None = None) -> Client:
    """A client of the daemon at `address` (`session`, `system` or a D-Bus address).

    By default: $FLASHD_BUS_ADDRESS if it is set, else the first of the private bus that `flash start` made, the session
    bus and the system bus that has a flashd. Raises Unavailable if none has.
    """
    from flashd import client

    return client.connect(address)


def __getattr__(name: str) -> Any:
    """What takes longer to import, when first asked for: importing flashd itself takes a few milliseconds."""
    if name in _STATE_DICTS:
        from flashd import state_dicts

        return getattr(state_dicts, name)
    if name in _MODELS:
        from flashd.compat.session import session

        return getattr(session, name)
    if name in __all__:
        from flashd import client

        return getattr(client, name)
    raise AttributeError(f"module 'flashd' has no attribute {name!r}")
