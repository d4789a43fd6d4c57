# SPDX-License-Identifier: Apache-2.0
"""Which changes a client may make through the page, beside what every request for a model does.

The gateway is one client of the daemon for all who ask it, so the daemon cannot tell them apart: a page must not lend
its visitor the rights of the gateway. Having a model serve, and parking it once it has answered all, are what
`/v1/chat/completions` and Ollama's `keep_alive` do for everybody, and need no further right.

    came by                                     memory                          models
    a user's own Unix socket                    yes                             yes
    the machine's Unix socket (group flashd)    yes                             no: the machine's gateway may not
    a loopback address                          with gateway.change_models      the same; of the machine's, no
    a token                                     if it was made with the right   the same; of the machine's, no
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashd.config.settings import GatewayConfig
from flashd.errors import NotAuthorized
from flashd.gateway.access import Access
from flashd.gateway.page.schema import Rights

SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Action:
    """A change. `right` names the field of Rights that it needs; empty for what every client may do."""

    right: str
    fields: str
    meaning: str


ACTIONS: Mapping[str, Action] = {
    "serve": Action("", "model", "has a model serve, after its turn has come; answers when it does"),
    "park": Action("", "model", "has it cease to serve once it has answered all"),
    "swap": Action("memory", "model", "makes it the active model: a job"),
    "load": Action("memory", "model, tier", "brings it into the memory of a tier, `host` or `device`: a job"),
    "evict": Action("memory", "model", "removes it from memory; it stays stored"),
    "cancel": Action("memory", "number", "cancels a job"),
    "pin": Action("models", "model", "protects it from eviction"),
    "unpin": Action("models", "model", "reverses pin"),
    "make-private": Action("models", "model", "hides it from other users"),
    "make-public": Action("models", "model", "reverses make-private"),
    "remove": Action("models", "model", "removes it"),
    "pull": Action("models", "repository", "downloads a model from the Hugging Face Hub: a job"),
}

_TOKEN = "this token is for using models: make another where flashd runs, with flash token new --changes NAME"
_SETTING = "every program of this machine can ask here: allow changes with flash config gateway.change_models true"
_MACHINE = "the machine's gateway may only use models: change them with flash, in a terminal"


def rights(access: Access, settings: GatewayConfig, bus: str) -> Rights:
    """What a client may change, where the gateway uses the daemon of `bus`."""
    if access.has_right_to_change:
        memory = ""
    elif not access.may_change_models:
        return Rights(_TOKEN, _TOKEN)
    else:
        memory = "" if access.is_over_socket or settings.change_models else _SETTING
    return Rights(memory, _MACHINE if bus == SYSTEM else memory)


def check(why_not: str) -> None:
    """Raises NotAuthorized if there is a reason."""
    if why_not:
        raise NotAuthorized("this may not be changed here", hint=why_not)
