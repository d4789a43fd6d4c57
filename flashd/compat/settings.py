# SPDX-License-Identifier: Apache-2.0
"""Which of flashd's settings do flashtensors' mean, and what happens to them?

A daemon that is started for a program gets them, for good, as by `flash config`. One that runs already is other
programs' too, and keeps its own: it is only said what differs, and how to change it.
"""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashd import config
from flashd.client import Client
from flashd.errors import InvalidArgument
from flashd.units import format_bytes, parse_bytes

log = logging.getLogger("flashtensors")

STORE_FOLDER = "flashd"  # in storage_path, where others may keep things as well
_SPARED = 0.8  # of the machine's memory; a pool larger than that is as good as no limit


def wanted(
    storage_path: str | os.PathLike[str] | None,
    mem_pool_size: int | None,
    chunk_size: int | None,
    num_threads: int | None,
) -> dict[str, str | int]:
    """flashd's settings by key. Raises InvalidArgument for sizes that make no sense."""
    given = {"mem_pool_size": mem_pool_size, "chunk_size": chunk_size, "num_threads": num_threads}
    for name, value in given.items():
        if value is not None and value <= 0:
            raise InvalidArgument(f"{name} cannot be {value}", hint="leave it out: flashd chooses by the machine")
    found: dict[str, str | int] = {}
    if storage_path is not None:
        found["store.path"] = str(Path(storage_path).expanduser().absolute() / STORE_FOLDER)
    if mem_pool_size is not None:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if mem_pool_size <= _SPARED * memory_bytes:
            found["memory.host_budget"] = mem_pool_size
        else:
            sizes = f"{format_bytes(mem_pool_size)}; this machine has {format_bytes(memory_bytes)}"
            log.warning("mem_pool_size is %s: flashd takes what it can", sizes)
    if chunk_size is not None:
        found["streamer.block"] = chunk_size
    if num_threads is not None:
        found["streamer.depth"] = num_threads
    return found


def write(settings: Mapping[str, str | int]) -> None:
    """Makes them this user's, for a daemon that is to be started."""
    paths = config.default_paths(config.Scope.USER)
    for key, value in settings.items():
        config.set_value(paths, key, str(value))


def value(client: Client, key: str) -> Any:
    """A setting as it is in force in the daemon."""
    found: Any = tomllib.loads(client.config())
    for part in key.split("."):
        found = found[part]
    return found


def tell_differences(client: Client, settings: Mapping[str, str | int]) -> None:
    """Says which settings of a running daemon are others, and what to do about it."""
    for key, meant in settings.items():
        current = value(client, key)
        if (parse_bytes(current) if isinstance(meant, int) else current) != meant:
            log.warning(
                "flashd runs already, with %s = %s; for %s: flash config %s %s, then flash stop",
                *(key, current, meant, key, meant),
            )
