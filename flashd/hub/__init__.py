# SPDX-License-Identifier: Apache-2.0
"""How does a model get from the Hugging Face Hub into the store? The caller downloads, the daemon converts meanwhile.

Whoever calls `client.pull` (`flash pull`, the tray, any program) downloads in its own process, as its own user: with
that user's token, proxies and caches. So a token never leaves the process that it belongs to: the daemon neither sees
one nor could show it. The machine's daemon has no network at all, and needs none; it gets descriptors of files that the
caller has opened, as in every import (flashd/daemon/pulls.py).

    repository.py   what a revision consists of, and which of its files are needed
    download.py     those files in a folder of the user's cache, resumed where an earlier attempt ended, and verified
    pull.py         hands them over: at first the small ones and the headers, then each shard when it has arrived
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PullOutcome:
    """What a pull did. `converted_early_bytes` of the checkpoint were written when the last shard arrived."""

    model: str
    repository: str
    commit: str
    was_there: bool
    downloaded_bytes: int
    converted_early_bytes: int
    seconds: float
