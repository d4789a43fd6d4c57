# SPDX-License-Identifier: Apache-2.0
"""Pulls models from the Hugging Face Hub: the caller downloads, while the daemon converts.

A program that calls `client.pull` (`flash pull`, the tray or another one) downloads in its own process, as its own
user, with that user's token, proxies and caches. So a token never leaves its process, and the daemon cannot disclose
it. The machine's daemon has no network access and needs none; it gets descriptors of files opened by the caller, as for
every import (flashd/daemon/ingest/pulls.py).

    repository.py   lists the files of a revision, and selects the needed ones
    variants.py     chooses one of several GGUF models
    download.py     downloads these into a folder of the user's cache, with resumption and verification
    receiver.py     the part of the client that a pull uses
    pull.py         passes them to the daemon: first the small ones and the headers, then each shard when it has arrived
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PullOutcome:
    """The outcome of a pull. `converted_early_bytes` of the checkpoint were written before the last shard arrived."""

    model: str
    repository: str
    commit: str
    was_there: bool
    downloaded_bytes: int
    converted_early_bytes: int
    seconds: float
