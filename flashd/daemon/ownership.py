# SPDX-License-Identifier: Apache-2.0
"""Whose is a model, who may know of it, and who may change it?

Each model is of the user who made it; those of the daemon's own user, made of the machine's drop folder, are common to
all. What is somebody's, only they and administrators change. A private model exists only for its owner, for root, and
for the members of one group if the configuration names one.
"""

from __future__ import annotations

import grp

from flashd.daemon.authorization import Authority, check_owner
from flashd.daemon.exports import EVERYBODY, Audience, Caller
from flashd.errors import AlreadyExists, InvalidArgument, NotFound
from flashd.store.catalog import Catalog, Model
from flashd.store.names import check_name


class Ownership:
    """The rules, for the catalog of one daemon."""

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
        """Of the model with this name; what is gone is no secret."""
        model = self._catalog.get(name)
        return self.audience(model) if model else EVERYBODY

    def is_public(self, name: str) -> bool:
        return self.audience_of(name) == EVERYBODY

    def sees(self, viewer: Caller, model: Model) -> bool:
        return self.audience(model).includes(viewer)

    def models(self, caller: Caller) -> list[Model]:
        return [model for model in self._catalog.models() if self.sees(caller, model)]

    def resolve(self, caller: Caller, text: str) -> Model:
        """The model that this caller means. Raises as Catalog.resolve."""
        return self._catalog.resolve(text, lambda model: self.sees(caller, model))

    async def check_change(self, caller: Caller, name: str) -> None:
        """Raises NotAuthorized unless the model is the caller's or common, or the caller an administrator."""
        model = self._catalog.get(name)
        if model is None or not self.sees(caller, model):
            raise NotFound(f"there is no model {name!r}", hint="flash list shows the models there are")
        if model.owner_uid != self._own_uid:
            await check_owner(self._authority, caller, model.owner_uid, model.name)

    async def owner_of_new(self, caller: Caller, name: str, *, replace: bool) -> int:
        """Whose an import of the caller's will be: the caller's, or, where it replaces one, whose that is.

        Raises AlreadyExists or NotAuthorized if it may not replace that.
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
    """Raises InvalidArgument if there is no such group: to whom private models are shown must not be a guess."""
    try:
        return grp.getgrnam(name).gr_gid if name else None
    except KeyError:
        hint = "see getent group, or leave store.private_group empty"
        raise InvalidArgument(f"store.private_group: there is no group {name!r}", hint=hint) from None
