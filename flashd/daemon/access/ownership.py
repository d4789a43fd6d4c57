# SPDX-License-Identifier: Apache-2.0
"""Ownership of models: their owners, and who may see and change them.

A model belongs to the user who made it. Models of the daemon's own user, made from the machine's models folder, are
common to all users; others may be changed only by their owner and administrators. A private model exists only for its
owner, for root, and for the members of one group if the configuration names one.
"""

from __future__ import annotations

import grp

from flashd.daemon.access.authorization import Authority, check_owner
from flashd.dbus.object_tree import EVERYBODY, Audience, Caller
from flashd.errors import AlreadyExists, InvalidArgument, NotFound
from flashd.store.catalog import Catalog, Model
from flashd.store.names import check_name
from flashd.swap.weights import Target


class Ownership:
    """The rules of ownership for one catalog."""

    def __init__(self, catalog: Catalog, authority: Authority, *, own_uid: int, private_group: int | None) -> None:
        self._catalog = catalog
        self._authority = authority
        self._own_uid = own_uid
        self._private_group = private_group

    def private_to(self, uid: int) -> Audience:
        return Audience(uid, self._private_group)

    def audience(self, model: Model) -> Audience:
        return self.private_to(model.owner_uid) if model.private else EVERYBODY

    def audience_of(self, name: str) -> Audience:
        """Returns the audience of a model. A removed model is not secret."""
        model = self._catalog.get(name)
        return self.audience(model) if model else EVERYBODY

    def audience_of_target(self, target: Target) -> Audience:
        """Returns the users who may see a model in an engine now, and could when the engine took it.

        The engine may hold an older version, which may have been private although the new one is not.
        """
        now = self.audience_of(target.model_name)
        return now if target.private_to is None or now != EVERYBODY else self.private_to(target.private_to)

    def is_public(self, target: Target) -> bool:
        return self.audience_of_target(target) == EVERYBODY

    def sees(self, viewer: Caller, model: Model) -> bool:
        return self.audience(model).includes(viewer)

    def knows(self, viewer: Caller, name: str) -> bool:
        """Tells whether this viewer sees a model with this name or alias."""
        return any(name in {model.name, *model.aliases} for model in self.models(viewer))

    def models(self, caller: Caller) -> list[Model]:
        return [model for model in self._catalog.models() if self.sees(caller, model)]

    def resolve(self, caller: Caller, text: str) -> Model:
        """Returns the model that this caller means. Raises like Catalog.resolve."""
        return self._catalog.resolve(text, lambda model: self.sees(caller, model))

    def check_seen(self, caller: Caller, name: str) -> None:
        """Checks that the caller can still see a model some time after it was resolved. Raises NotFound."""
        model = self._catalog.get(name)
        if model is None or not self.sees(caller, model):
            raise NotFound(f"there is no model {name!r}", hint="flash list shows the models there are")

    async def check_change(self, caller: Caller, name: str) -> None:
        """Checks that the caller may change a model: as its owner, as administrator, or because it is common to all.

        Raises NotFound or NotAuthorized.
        """
        self.check_seen(caller, name)
        model = self._catalog.get(name)
        assert model is not None, "it is seen"
        await self.check_owner(caller, model, model.name)

    async def check_owner(self, caller: Caller, model: Model, what: str) -> None:
        """Checks that the caller may change `what`, which belongs to a model. Raises NotAuthorized."""
        if model.owner_uid != self._own_uid:
            await check_owner(self._authority, caller, model.owner_uid, what)

    async def owner_of_new(self, caller: Caller, name: str, *, replace: bool) -> int:
        """Returns the owner of an import: the caller, or the owner of the model that it replaces.

        Raises AlreadyExists or NotAuthorized if the caller may not replace that model.
        """
        model = self._catalog.get(check_name(name))
        if model is None or not replace:
            return caller.uid
        if not self.sees(caller, model):
            raise AlreadyExists(
                f"another user has a model {model.name!r}", hint="choose another name, such as YOU/NAME"
            )
        await self.check_change(caller, model.name)
        return model.owner_uid


def group_id(name: str) -> int | None:
    """Looks up a group. Raises InvalidArgument for an unknown one, because access to private models depends on it."""
    try:
        return grp.getgrnam(name).gr_gid if name else None
    except KeyError:
        hint = "choose a group from getent group, or leave store.private_group empty"
        raise InvalidArgument(f"store.private_group: there is no group {name!r}", hint=hint) from None
