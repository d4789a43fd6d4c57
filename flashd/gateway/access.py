# SPDX-License-Identifier: Apache-2.0
"""What the client of a request may do, for all that happens for the request."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from flashd.config.settings import GatewayConfig


@dataclass(frozen=True, slots=True)
class Access:
    """The rights of a client, as guard.py found them out.

    It `sees_private` models if it is known to be the user whose models the daemon shows us. If its token is for some
    `models`, it may use no others. It `may_change_models`, where the gateway allows that, if it came without a token.
    `is_over_socket` is whether it came by the Unix socket, which other users' programs cannot open. A token that was
    made with it `has_right_to_change` models, whatever the gateway allows others.
    """

    sees_private: bool = True
    models: tuple[str, ...] = ()
    may_change_models: bool = True
    is_over_socket: bool = True
    has_right_to_change: bool = False

    def cannot_change_models(self, settings: GatewayConfig) -> str:
        """Why it may not pull and remove models, and what to do about it; empty if it may."""
        if self.has_right_to_change:
            return ""
        if not settings.change_models:
            return "use flash pull and flash rm, or allow it: flash config gateway.change_models true"
        return "" if self.may_change_models else "ask without a token, on the machine itself"


ACCESS: ContextVar[Access] = ContextVar("access", default=Access())  # noqa: B039 -- it is frozen
