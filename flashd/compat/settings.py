# SPDX-License-Identifier: Apache-2.0
"""Maps flashtensors' settings to flashd's.

A daemon that is started for a program gets them permanently, as by `flash config`. A daemon that is already running
keeps its settings, because other programs use it too; differences are only logged, with the way to change them.
"""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashd.client.client import Client
from flashd.config import loading
from flashd.config.paths import Scope, default_paths
from flashd.errors import InvalidArgument
from flashd.units import format_bytes, parse_bytes

log = logging.getLogger("flashtensors")

STORE_FOLDER = "flashd"  # a folder in storage_path, which other programs may use too
_SPARED = 0.8  # share of the machine's memory; a larger pool counts as no limit


def wanted(
    storage_path: str | os.PathLike[str] | None,
    mem_pool_size: int | None,
    chunk_size: int | None,
    num_threads: int | None,
) -> dict[str, str | int]:
    """Returns flashd's settings by key. Raises InvalidArgument for impossible sizes."""
    given = {"mem_pool_size": mem_pool_size, "chunk_size": chunk_size, "num_threads": num_threads}
    for name, value in given.items():
        if value is not None and value <= 0:
            raise InvalidArgument(f"{name} cannot be {value}", hint="omit it, so that flashd chooses by the machine")
    found: dict[str, str | int] = {}
    if storage_path is not None:
        found["store.path"] = str(Path(storage_path).expanduser().absolute() / STORE_FOLDER)
    if mem_pool_size is not None:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if mem_pool_size <= _SPARED * memory_bytes:
            found["memory.host_budget"] = mem_pool_size
        else:
            sizes = f"{format_bytes(mem_pool_size)}; this machine has {format_bytes(memory_bytes)}"
            log.warning("mem_pool_size is %s: flashd uses its default", sizes)
    if chunk_size is not None:
        found["streamer.block"] = chunk_size
    if num_threads is not None:
        found["streamer.depth"] = num_threads
    return found


def write(settings: Mapping[str, str | int]) -> None:
    """Writes settings for this user, before the daemon is started."""
    paths = default_paths(Scope.USER)
    for key, value in settings.items():
        loading.set_value(paths, key, str(value))


def value(client: Client, key: str) -> Any:
    """Returns the value of a setting in force in the daemon."""
    found: Any = tomllib.loads(client.config())
    for part in key.split("."):
        found = found[part]
    return found


def tell_differences(client: Client, settings: Mapping[str, str | int]) -> None:
    """Logs the settings of a running daemon that differ, with the way to change them."""
    for key, meant in settings.items():
        current = value(client, key)
        if (parse_bytes(current) if isinstance(meant, int) else current) != meant:
            log.warning(
                "flashd is already running with %s = %s; to use %s: flash config %s %s, then flash restart",
                *(key, current, meant, key, meant),
            )
