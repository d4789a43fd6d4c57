# SPDX-License-Identifier: Apache-2.0
"""Authorisation on the system bus by polkit: active local users, groups, administrators and their rules.

The subject is the caller's bus name, so that no other process can take its place while a person types a password. Only
the caller waits for the answer. Everything but a clear yes counts as a no. The actions are in
packaging/polkit/org.flashd1.policy; their owner annotation permits us to ask about other users without being root.

Protocol: https://www.freedesktop.org/software/polkit/docs/latest/eggdbus-interface-org.freedesktop.PolicyKit1.Authority.html
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Mapping

from dbus_next import Variant

from flashd.daemon.access.authorization import Action
from flashd.dbus.connection import Connection, plain
from flashd.dbus.object_tree import Caller
from flashd.errors import FlashdError, NotAuthorized

POLKIT = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY = "org.freedesktop.PolicyKit1.Authority"

# Polkit's names for our actions. Reading is permitted to all users without polkit.
ACTION_IDS: Mapping[Action, str] = {
    Action.USE: "org.flashd1.use",
    Action.MANAGE: "org.flashd1.manage",
    Action.ADMINISTER: "org.flashd1.administer",
}
_MEMBERS = "log in at the machine itself, join the group flashd (and log in again), or ask an administrator"
_HINTS: Mapping[Action, str] = {
    Action.USE: _MEMBERS,
    Action.MANAGE: _MEMBERS,
    Action.ADMINISTER: "ask an administrator, or use sudo",
}
_ALLOW_USER_INTERACTION = 1
_ANSWER_S = 25.0
_PERSON_S = 300.0  # a person may have to type a password


class Polkit:
    """The authority of a daemon on the system bus."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)

    async def check(self, caller: Caller, action: Action) -> None:
        # Polkit would permit everything to root too, and root must be able to stop us even if polkit is broken.
        if action is Action.READ or caller.uid == 0:
            return
        action_id = ACTION_IDS[action]
        try:
            is_authorized, is_challenge = await self._ask(caller, action_id)
        except FlashdError as error:
            hint = "check that polkitd is installed and running: systemctl status polkit"
            raise NotAuthorized(f"polkit could not be asked about {action_id}: {error.message}", hint=hint) from error
        if is_authorized:
            return
        if is_challenge and not caller.interactive:
            hint = "permit interactive authorisation in the call, like flash, or ask an administrator"
            raise NotAuthorized(f"you may not {action.value} without a password ({action_id})", hint=hint)
        raise NotAuthorized(f"you may not {action.value} ({action_id})", hint=_HINTS[action])

    async def _ask(self, caller: Caller, action_id: str) -> tuple[bool, bool]:
        """Asks polkit. Returns whether the caller is authorised, and whether a person could still be asked."""
        subject = ["system-bus-name", {"name": Variant("s", caller.peer)}]
        flags = _ALLOW_USER_INTERACTION if caller.interactive else 0
        cancellation = f"flashd-{os.getpid()}-{next(self._numbers)}"
        try:
            reply = await self._connection.call(
                POLKIT,
                AUTHORITY_PATH,
                AUTHORITY,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                [subject, action_id, {}, flags, cancellation],
                timeout_s=_PERSON_S if caller.interactive else _ANSWER_S,
                auto_start=True,
            )
        except (asyncio.CancelledError, FlashdError):
            await self._cancel(cancellation)
            raise
        is_authorized, is_challenge, _ = plain(reply.body[0])
        return is_authorized is True, is_challenge is True

    async def _cancel(self, cancellation: str) -> None:
        """Removes polkit's dialog, if it is still shown."""
        with contextlib.suppress(FlashdError):
            await self._connection.call(
                POLKIT, AUTHORITY_PATH, AUTHORITY, "CancelCheckAuthorization", "s", [cancellation], timeout_s=1.0
            )
