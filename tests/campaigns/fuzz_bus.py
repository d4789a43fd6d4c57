# SPDX-License-Identifier: Apache-2.0
"""Every method of the bus with arguments made up from its signature, and control frames of engines made of bytes.

A call is answered, or refused with an error of ours that is no defect; the daemon answers everybody else meanwhile, and
its log has no traceback. A frame is read whole or refused, and leaves no descriptor open.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import socket
import struct
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from campaign import Campaign, main
from dbus_next import Variant
from running import Daemon

from flashd.dbus import wire
from flashd.dbus.connection import Connection, connect
from flashd.dbus.private_bus import PrivateBus
from flashd.engines.control import Channel, pair
from flashd.errors import FlashdError, Internal, Unavailable
from flashd.tasks import close_all

ANSWER_S = 10.0
NOT_CALLED = {"Stop", "Restart"}  # they stop the daemon
TEXTS = [
    *(
        "",
        "ada",
        "a/b",
        "../x",
        "/",
        "\x1b[31m",
        "\u202e",
        "[red]",
        "é" * 200,
        "a" * 300,
        "a" * 70_000,
        "NaN",
        "\n\n",
        "%s",
    ),
    *("engines.default", "models.ada.engine", "host", "device", "torch", "vllm", "0", "-1", "org.flashd1"),
]
PATHS = ["/", "/org/flashd1", "/org/flashd1/job/1", "/org/flashd1/job/99999999999999", "/org/flashd1/model/_", "/a/b"]


@dataclass(frozen=True, slots=True)
class Method:
    interface: str
    name: str
    arguments: tuple[str, ...]  # signatures of its arguments


def methods() -> list[Method]:
    """All that the interface files declare."""
    found = []
    for file in sorted(resources.files("flashd.dbus.interfaces").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".xml"):
            for interface in ElementTree.fromstring(file.read_text()).iter("interface"):
                for method in interface.findall("method"):
                    taken = (a.get("type", "") for a in method.findall("arg") if a.get("direction", "in") == "in")
                    found.append(Method(interface.get("name", ""), method.get("name", ""), tuple(taken)))
    return [method for method in found if method.name not in NOT_CALLED]


def made_up(chance: random.Random, kind: str) -> Any:
    """A value of a D-Bus type."""
    match kind[0]:
        case "s":
            return chance.choice(TEXTS)
        case "o":
            return chance.choice(PATHS)
        case "b":
            return chance.random() < 0.5
        case "d":
            return chance.choice([0.0, -1.0, 1e308, float("nan"), float("inf")])
        case "h":
            return chance.randrange(3)
        case "v":
            inner = chance.choice(["s", "b", "t", "as"])
            return Variant(inner, made_up(chance, inner))
        case "a" if kind[1] == "{":
            key, value = kind[2], kind[3:-1]
            return {made_up(chance, key): made_up(chance, value) for _ in range(chance.choice([0, 1, 3]))}
        case "a":
            return [made_up(chance, kind[1:]) for _ in range(chance.choice([0, 1, 3, 300]))]
        case _:
            bits = {"y": 8, "n": 15, "q": 16, "i": 31, "u": 32, "x": 63, "t": 64}[kind]
            return chance.choice([0, 1, chance.randrange(2**bits), 2**bits - 1])


async def run(campaign: Campaign) -> None:
    with tempfile.TemporaryDirectory(prefix="fd-") as short, PrivateBus(Path(short)) as bus:
        daemon = Daemon(bus.address, Path(short) / "root", Path(short))
        daemon.root.mkdir()
        daemon.start()
        try:
            await _fuzz(campaign, bus.address)
        finally:
            status = daemon.stop()
        words = daemon.log.read_text()
        if status != 0 or "Traceback" in words or "never retrieved" in words:
            campaign.finding(f"the daemon ended with {status}, and its log says:\n{words[-6000:]}")


async def _fuzz(campaign: Campaign, address: str) -> None:
    known, others = methods(), await connect(address)
    connection = await connect(address)
    while campaign.goes_on():
        try:
            await asyncio.gather(*(_call(campaign, connection, known) for _ in range(8)))
            await others.call(wire.BUS_NAME, wire.ROOT_PATH, wire.MANAGER, "ListModels", timeout_s=ANSWER_S)
        except (Unavailable, OSError) as error:
            campaign.finding(f"somebody else is not answered: {error}")
            await connection.close()
            connection = await connect(address)
        for _ in range(20):
            _frame(campaign)
    for made in (connection, others):
        await made.close()


async def _call(campaign: Campaign, connection: Connection, known: list[Method]) -> None:
    chance = campaign.random
    method = chance.choice(known)
    body = [made_up(chance, kind) for kind in method.arguments]
    path = wire.ROOT_PATH if method.interface == wire.MANAGER else chance.choice(PATHS)
    case = f"{method.interface}.{method.name}{tuple(body)!r} of {path}"[:600]
    campaign.count("calls")
    with Path(os.devnull).open("rb") as nothing, tempfile.TemporaryFile() as empty:
        fds = [empty.fileno(), nothing.fileno(), empty.fileno()] if "h" in "".join(method.arguments) else []
        try:
            await connection.call(
                wire.BUS_NAME, path, method.interface, method.name, "".join(method.arguments), body, fds=fds,
                timeout_s=ANSWER_S,
            )  # fmt: skip
            campaign.count("answered")
        except Unavailable as error:
            if "did not answer" in error.message:
                campaign.finding(f"{case}: {error.message}")
        except Internal as error:
            if "org.freedesktop" not in error.message:
                campaign.finding(f"{case}: {error}")
        except FlashdError as error:
            if not error.message or len(str(error)) > 5000:
                campaign.finding(f"{case}: an error of {len(str(error))} characters")


def _frame(campaign: Campaign) -> None:
    """What a worker may say to the daemon, which trusts it with nothing."""
    chance = campaign.random
    campaign.count("frames")
    open_before = len(os.listdir("/proc/self/fd"))
    ours, theirs = pair()
    raw = chance.choice(
        [
            b"@", b"[]", b"null", b"{", b"\xff\xfe{}", b"{" * 20_000, b"[" * 30_000, b'{"order": ' + b"9" * 5000 + b"}",
            json.dumps({"notice": chance.choice(TEXTS)[:1000], "order": chance.choice([None, 1, "x", []])}).encode(),
            chance.randbytes(chance.randrange(1, 2000)), struct.pack("<Q", chance.randrange(2**64)),
        ]
    )  # fmt: skip
    fds = [os.memfd_create("frame", os.MFD_ALLOW_SEALING) for _ in range(chance.randrange(3))]
    for fd in fds:
        os.write(fd, chance.choice([b"{}", b"[" * 100_000, chance.randbytes(100), b""]))
        if chance.random() < 0.7:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    try:
        socket.send_fds(theirs, [raw], fds)
        close_all(Channel(ours).receive().fds)
    except (ValueError, EOFError, OSError):
        pass  # refused: the channel ends, and so does the worker
    except BaseException as defect:  # noqa: BLE001 -- that is what we look for
        campaign.finding(f"a frame {raw[:80]!r} with {len(fds)} descriptors: {defect!r}")
    finally:
        close_all(fds)
        ours.close()
        theirs.close()
    if len(os.listdir("/proc/self/fd")) != open_before:
        campaign.finding(f"a frame {raw[:80]!r} with {len(fds)} descriptors left one open")


if __name__ == "__main__":
    main(run, whole_s=600)
