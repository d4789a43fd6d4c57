# SPDX-License-Identifier: Apache-2.0
"""Authorisation: one table of all methods, with the action that each requires.

Properties are readable for all callers that the bus policy permits. A method that is missing from the table is refused,
so that a forgotten entry is never a security hole; a test compares the table with the interface XML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Protocol

from flashd.dbus import wire
from flashd.dbus.object_tree import Caller
from flashd.errors import NotAuthorized


class Action(Enum):
    """Actions for which polkit may ask a person. The values complete "you may not ..."."""

    READ = "ask about models"
    USE = "use models"
    MANAGE = "add, change or remove models"
    ADMINISTER = "configure or stop the daemon"


ACTIONS: Mapping[tuple[str, str], Action] = {
    (wire.MANAGER, "FindModel"): Action.READ,
    (wire.MANAGER, "ListModels"): Action.READ,
    (wire.MANAGER, "Import"): Action.MANAGE,
    (wire.MANAGER, "ImportFiles"): Action.MANAGE,
    (wire.MANAGER, "Pull"): Action.MANAGE,
    (wire.MANAGER, "ClaimPull"): Action.MANAGE,
    (wire.MANAGER, "BeginPull"): Action.MANAGE,
    (wire.MANAGER, "PullFiles"): Action.MANAGE,
    (wire.MANAGER, "PullProgress"): Action.MANAGE,
    (wire.MANAGER, "PullFailed"): Action.MANAGE,
    (wire.MANAGER, "Swap"): Action.USE,
    (wire.MANAGER, "Serve"): Action.USE,
    (wire.MANAGER, "WouldDisplace"): Action.USE,
    (wire.MANAGER, "Load"): Action.USE,
    (wire.MANAGER, "Lease"): Action.USE,
    (wire.MANAGER, "LeaseImage"): Action.USE,
    (wire.MANAGER, "PublishImage"): Action.USE,
    (wire.MANAGER, "OpenEndpoint"): Action.USE,
    (wire.MANAGER, "Park"): Action.USE,
    (wire.MANAGER, "Scrub"): Action.MANAGE,
    (wire.MANAGER, "Collect"): Action.MANAGE,
    (wire.MANAGER, "GetConfig"): Action.READ,
    (wire.MANAGER, "GetNextConfig"): Action.READ,
    (wire.MANAGER, "SetConfig"): Action.ADMINISTER,
    (wire.MANAGER, "ListEnvironments"): Action.READ,
    (wire.MANAGER, "InstallEnvironment"): Action.ADMINISTER,
    (wire.MANAGER, "AddWheels"): Action.ADMINISTER,
    (wire.MANAGER, "UseEnvironment"): Action.ADMINISTER,
    (wire.MANAGER, "RemoveEnvironment"): Action.ADMINISTER,
    (wire.MANAGER, "Stop"): Action.ADMINISTER,
    (wire.MANAGER, "Restart"): Action.ADMINISTER,
    (wire.MODEL, "Pin"): Action.MANAGE,
    (wire.MODEL, "Unpin"): Action.MANAGE,
    (wire.MODEL, "OpenEndpoint"): Action.USE,
    (wire.MODEL, "Park"): Action.USE,
    (wire.MODEL, "SetIdleTimeout"): Action.USE,
    (wire.MODEL, "Evict"): Action.USE,
    (wire.MODEL, "SetAliases"): Action.MANAGE,
    (wire.MODEL, "SetPrivate"): Action.MANAGE,
    (wire.MODEL, "Remove"): Action.MANAGE,
    (wire.MODEL, "Verify"): Action.USE,
    (wire.JOB, "Cancel"): Action.USE,
    (wire.LEASE, "Release"): Action.USE,
    (wire.ENGINE, "Stop"): Action.USE,
}


class Authority(Protocol):
    """Decides whether a caller may perform an action."""

    async def check(self, caller: Caller, action: Action) -> None:
        """Checks that the caller may perform the action. Raises NotAuthorized."""


class SameUser:
    """The authority of a user's own daemon, which permits everything to that user and root, and nothing to others."""

    def __init__(self, uid: int) -> None:
        self._uid = uid

    async def check(self, caller: Caller, action: Action) -> None:
        if caller.uid not in {self._uid, 0}:
            hint = f"ask user {self._uid}, the owner of this daemon, or run your own: flash start"
            raise NotAuthorized(f"user {caller.uid} may not {action.value} here", hint=hint)


async def authorize(authority: Authority, caller: Caller, interface: str, member: str) -> None:
    """Checks that the caller may call a method. Raises NotAuthorized, also for methods without an entry."""
    action = ACTIONS.get((interface, member))
    if action is None:
        raise NotAuthorized(f"{interface}.{member} may not be called", hint="this is a bug in flashd: please report it")
    await authority.check(caller, action)


async def may_administer(authority: Authority, caller: Caller) -> bool:
    """Tells whether the caller may administer, without asking for a password now."""
    try:
        await authority.check(dataclasses.replace(caller, interactive=False), Action.ADMINISTER)
    except NotAuthorized:
        return False
    return True


async def check_owner(authority: Authority, caller: Caller, owner_uid: int, what: str) -> None:
    """Checks that the caller is the owner of `what`, or may administer. Raises NotAuthorized."""
    if caller.uid == owner_uid:
        return
    try:
        await authority.check(caller, Action.ADMINISTER)
    except NotAuthorized as error:
        hint = "only this user, or an administrator, may do this"
        raise NotAuthorized(f"{what} belongs to user {owner_uid}", hint=hint) from error
