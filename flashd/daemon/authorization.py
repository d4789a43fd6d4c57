# SPDX-License-Identifier: Apache-2.0
"""Who may do what? One table of every method, and nothing that is not in it.

Properties are readable for everybody whom the policy of the bus lets talk to us. A method that this table does not
name is refused, so that a forgotten entry is a refusal and never a hole; a test compares it with the interface XML.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Protocol

from flashd import wire
from flashd.daemon.exports import Caller
from flashd.errors import NotAuthorized


class Action(Enum):
    """What a person would be asked about; the values are worded for "you may not ..."."""

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
    (wire.MANAGER, "Load"): Action.USE,
    (wire.MANAGER, "Lease"): Action.USE,
    (wire.MANAGER, "LeaseImage"): Action.USE,
    (wire.MANAGER, "PublishImage"): Action.USE,
    (wire.MANAGER, "OpenEndpoint"): Action.USE,
    (wire.MANAGER, "Park"): Action.USE,
    (wire.MANAGER, "Scrub"): Action.MANAGE,
    (wire.MANAGER, "Collect"): Action.MANAGE,
    (wire.MANAGER, "GetConfig"): Action.READ,
    (wire.MANAGER, "SetConfig"): Action.ADMINISTER,
    (wire.MANAGER, "ListEnvironments"): Action.READ,
    (wire.MANAGER, "InstallEnvironment"): Action.ADMINISTER,
    (wire.MANAGER, "AddWheels"): Action.ADMINISTER,
    (wire.MANAGER, "UseEnvironment"): Action.ADMINISTER,
    (wire.MANAGER, "RemoveEnvironment"): Action.ADMINISTER,
    (wire.MANAGER, "Stop"): Action.ADMINISTER,
    (wire.MODEL, "Pin"): Action.MANAGE,
    (wire.MODEL, "Unpin"): Action.MANAGE,
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
    """Decides for one caller and one action."""

    async def check(self, caller: Caller, action: Action) -> None:
        """Returns if the caller may; raises NotAuthorized."""


class SameUser:
    """Everything for the user whose daemon this is and for root; nothing for anybody else."""

    def __init__(self, uid: int) -> None:
        self._uid = uid

    async def check(self, caller: Caller, action: Action) -> None:
        if caller.uid not in {self._uid, 0}:
            hint = f"ask user {self._uid}, whose daemon this is, or run one of your own: flash start"
            raise NotAuthorized(f"user {caller.uid} may not {action.value} here", hint=hint)


async def authorize(authority: Authority, caller: Caller, interface: str, member: str) -> None:
    """Raises NotAuthorized unless this caller may call this method; methods without an entry are nobody's."""
    action = ACTIONS.get((interface, member))
    if action is None:
        raise NotAuthorized(f"nobody may call {interface}.{member}", hint="this is a defect: please report it")
    await authority.check(caller, action)


async def check_owner(authority: Authority, caller: Caller, owner_uid: int, what: str) -> None:
    """Raises NotAuthorized unless it is the caller's own, or the caller may administer."""
    if caller.uid == owner_uid:
        return
    try:
        await authority.check(caller, Action.ADMINISTER)
    except NotAuthorized as error:
        hint = "only they, or an administrator, may do this"
        raise NotAuthorized(f"{what} belongs to user {owner_uid}", hint=hint) from error
