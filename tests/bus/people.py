# SPDX-License-Identifier: Apache-2.0
"""The machine's daemon on a bus with several users, and a polkit that lets only root administer it."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from conftest import Remote

from flashd.daemon.access.polkit import POLKIT
from flashd.dbus import private_bus, wire
from flashd.dbus.connection import Connection, Received, Reply, connect
from flashd.dbus.private_bus import PrivateBus

# The bus asks who they are, so they are users that every Debian has.
ALICE, BOB, CAROL = (pwd.getpwnam(name).pw_uid for name in ("daemon", "bin", "games"))


@contextmanager
def shared_bus(folder: Path) -> Iterator[PrivateBus]:
    """A bus that lets every user on it."""
    folder.chmod(0o755)
    for_all = private_bus._CONFIGURATION.replace("<allow own", '<allow user="*"/><allow own')
    with mock.patch.object(private_bus, "_CONFIGURATION", for_all), PrivateBus(folder) as bus:
        yield bus


@dataclass(slots=True)
class Polkit:
    """Everybody may use and manage, and nobody administer."""

    connection: Connection
    refused: Collection[str]
    asked: list[str] = field(default_factory=list)

    @classmethod
    async def on(cls, bus: PrivateBus, *, refused: Collection[str] = ("administer",)) -> Polkit:
        made = cls(await connect(bus.address), {f"org.flashd1.{action}" for action in refused})
        made.connection.serve(made._answer)
        await made.connection.own(POLKIT)
        return made

    async def _answer(self, call: Received) -> Reply:
        if call.member == "CancelCheckAuthorization":
            return Reply()
        self.asked.append(call.body[1])
        return Reply("(bba{ss})", ([call.body[1] not in self.refused, False, {}],))


async def connect_as(bus: PrivateBus, uid: int, gids: Collection[int] = ()) -> Remote:
    """A program of another user: the kernel tells the bus who we are when we connect."""
    before = os.getgroups()
    os.setgroups(list(gids))
    os.seteuid(uid)
    try:
        with mock.patch("os.getuid", return_value=uid):
            remote = Remote(await connect(bus.address))
    finally:
        os.seteuid(0)
        os.setgroups(before)
    remote.connection.listen(remote.signals.append)
    await remote.connection.add_match(f"type='signal',sender='{wire.BUS_NAME}'")
    return remote


async def heard(remote: Remote) -> str:
    """All signals so far, as text: what a program could have learned from them."""
    await asyncio.sleep(0.2)
    return "\n".join(f"{s.path} {s.interface}.{s.member} {s.body}" for s in remote.signals)
