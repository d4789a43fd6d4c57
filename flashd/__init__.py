# SPDX-License-Identifier: Apache-2.0
"""Keeps a hundred models on one machine and switches between them in moments.

import flashd

with flashd.connect() as client:
    client.swap("Qwen/Qwen3-0.6B")
    print(client.chat("Qwen/Qwen3-0.6B", [{"role": "user", "content": "Who are you?"}]))

Everything here is imported on first use, so that `import flashd` takes a millisecond. Code inside the package imports
the modules themselves, never from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashd._version import __version__

if TYPE_CHECKING:
    from flashd import errors
    from flashd.client.client import Client, Job, Lease, connect
    from flashd.client.results import Device, Engine, Environment, Event, Model, Status, SwapOutcome
    from flashd.client.state_dicts import load_dict, load_dict_non_blocking, save_dict
    from flashd.errors import FlashdError
    from flashd.hub import PullOutcome

__all__ = [
    "Client",
    "Device",
    "Engine",
    "Environment",
    "Event",
    "FlashdError",
    "Job",
    "Lease",
    "Model",
    "PullOutcome",
    "Status",
    "SwapOutcome",
    "__version__",
    "connect",
    "errors",
    "load_dict",
    "load_dict_non_blocking",
    "save_dict",
]
_RESULTS = "flashd.client.results"
_HOMES = {
    **dict.fromkeys(["Device", "Engine", "Environment", "Event", "Model", "Status", "SwapOutcome"], _RESULTS),
    "FlashdError": "flashd.errors",
    "PullOutcome": "flashd.hub",
    "load_dict": "flashd.client.state_dicts",
    "load_dict_non_blocking": "flashd.client.state_dicts",
    "save_dict": "flashd.client.state_dicts",
}


def __getattr__(name: str) -> Any:
    """Imports the object called `name`."""
    if name not in __all__:
        raise AttributeError(f"module 'flashd' has no attribute {name!r}")
    if name == "errors":
        return import_module("flashd.errors")
    return getattr(import_module(_HOMES.get(name, "flashd.client.client")), name)


def __dir__() -> list[str]:
    return __all__
