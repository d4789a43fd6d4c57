# SPDX-License-Identifier: Apache-2.0
"""Salts that keep the prefixes of several checkpoints apart in the prefix cache of one vLLM engine.

vLLM finds a block of its KV cache by a hash over the tokens up to its end, and over the request's `cache_salt`, which
is part of the first block's hash and so of all that follow. Every request gets a salt that names the checkpoint and the
adapter that compute it. So an engine that comes back to a checkpoint finds the prefixes that it has computed with it
before, and can find no others.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Protocol


class Adapter(Protocol):
    """vLLM's LoRARequest. Each adapter that vLLM loads gets another `lora_int_id`."""

    lora_name: str
    lora_int_id: int


class Request(Protocol):
    """vLLM's EngineCoreRequest, as far as it concerns salts."""

    cache_salt: str | None
    lora_request: Adapter | None


class Salts:
    """The salts of one engine's requests."""

    def __init__(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Gives the requests from now on a salt that no others have, because it is unknown what will compute them."""
        self.enter(secrets.token_hex(16), {})

    def enter(self, checkpoint_id: str, adapters: Mapping[str, str]) -> None:
        """Names what computes the requests from now on: a checkpoint, and adapters as a table of names and ids."""
        self._checkpoint_id = checkpoint_id
        self._adapters = adapters

    def add(self, request: Request) -> None:
        """Makes the salt a part of the request's own salt, which goes on parting it from other requests.

        No two different combinations give the same salt, because ids have neither dots nor colons.
        """
        salt = self._checkpoint_id
        if (adapter := request.lora_request) is not None:
            salt += "." + self._adapters.get(adapter.lora_name, str(adapter.lora_int_id))
        if request.cache_salt:
            salt += ":" + request.cache_salt
        request.cache_salt = salt
