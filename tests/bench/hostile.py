# SPDX-License-Identifier: Apache-2.0
"""The waiting time of other callers while 50 callers without rights do their worst.

    sudo tests/bench/hostile.py [--json] [--callers N] [--seconds S] [--models N]

The daemon is one of a machine, on a bus of its own, with as many models as are asked for. Callers are programs of two
users whom polkit lets do nothing: they list, search and introspect without a pause, send arguments beyond every limit,
messages of megabytes, calls that nobody waits for, signals, and arguments that are wrong. Meanwhile a third user calls
ListModels, which is what is measured, beside the same call with nobody else there and a call to the bus daemon itself,
which all of it passes through. The promise is 100 ms for 99 of 100 calls.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "bus"), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

from daemon import fill_store  # noqa: E402
from dbus_next import Variant  # noqa: E402
from people import ALICE, BOB, CAROL, Polkit, shared_bus  # noqa: E402
from raw import NO_REPLY, Raw, marshalled, text  # noqa: E402
from running import Daemon  # noqa: E402

from flashd.bench.report import Row, cost_row, report  # noqa: E402
from flashd.dbus import wire  # noqa: E402
from flashd.dbus.wire import OBJECT_MANAGER, PROPERTIES  # noqa: E402

LIMIT_S = 0.1
_INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
_MANAGER = (wire.BUS_NAME, wire.ROOT_PATH, wire.MANAGER)


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def attack(address: str, uid: int, seed: int, floods: bool) -> None:
    """One hostile caller, until it is ended."""
    become(uid)
    chosen = random.Random(seed)
    options = {f"x{n}": Variant("as", ["y"] * 60) for n in range(60)}
    asked = [
        (*_MANAGER, "ListModels"),
        (wire.BUS_NAME, wire.ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects"),
        (wire.BUS_NAME, wire.ROOT_PATH, _INTROSPECTABLE, "Introspect"),
        (wire.BUS_NAME, f"{wire.ROOT_PATH}/model", _INTROSPECTABLE, "Introspect"),
        (*_MANAGER, "GetConfig"),
        (*_MANAGER, "GetNextConfig"),
    ]
    sent = [
        (*_MANAGER, "FindModel", "s", text("model-" * 170)),
        (*_MANAGER, "FindModel", "s", text("a" * 300_000)),
        (*_MANAGER, "Swap", "sa{sv}", marshalled("sa{sv}", "x", options)),
        (*_MANAGER, "SetConfig", "ss", marshalled("ss", "engines.default", "[" * 60_000)),
        (*_MANAGER, "Import", "sa{sh}ba{sv}", marshalled("sa{sh}ba{sv}", "x", {}, True, options)),
        (wire.BUS_NAME, wire.ROOT_PATH, PROPERTIES, "GetAll", "s", text(wire.MANAGER)),
        (wire.BUS_NAME, wire.ROOT_PATH, PROPERTIES, "Get", "ss", marshalled("ss", wire.MANAGER, "x" * 100_000)),
        (*_MANAGER, "NoSuchMethod", "as", marshalled("as", ["x"] * 20_000)),
    ]
    caller = Raw(address)
    while True:
        with suppress(TimeoutError):
            match chosen.randrange(0 if floods else 2, 20):
                case 0:  # a burst of calls, whose answers are read afterwards
                    burst = [caller.message(*chosen.choice(sent[:6])) for _ in range(100)]
                    caller.send(b"".join(burst))
                    list(caller.answers(100))
                case 1:  # calls without replies, and unicast signals to the daemon
                    burst = [caller.message(*chosen.choice(sent), flags=NO_REPLY) for _ in range(20)]
                    burst += [caller.message(*sent[1], kind=4) for _ in range(5)]
                    caller.send(b"".join(burst))
                case 2:
                    caller.send(caller.message(*_MANAGER, "FindModel", "s", text("a" * 2_000_000)))
                    list(caller.answers(1))
                case number if number < 9:
                    caller.call(*chosen.choice(asked))
                case _:
                    caller.send(caller.message(*chosen.choice(sent)))
                    list(caller.answers(1))


def measured(address: str, uid: int, seconds: float, *message: str) -> list[float]:
    """Seconds that each call of somebody else takes."""
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def measure() -> None:
        become(uid)
        caller, found = Raw(address), []
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            began = time.perf_counter()
            kind, _ = caller.call(*message)
            assert kind == 2
            found.append(time.perf_counter() - began)
            time.sleep(0.01)
        sending.send(found)

    process = multiprocessing.Process(target=measure)
    process.start()
    found: list[float] = receiving.recv()
    process.join()
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


async def run(callers: int, seconds: float, models: int, floods: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder, shared_bus(Path(folder)) as bus:
        polkit = await Polkit.on(bus, refused=("use", "manage", "administer"))
        os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = bus.address
        fill_store(Path(folder), models)
        daemon = Daemon("system", Path(folder), Path(folder))
        daemon.start()
        try:
            return await asyncio.to_thread(_measure, bus.address, callers, seconds, floods)
        finally:
            daemon.stop()
            await polkit.connection.close()


def _measure(address: str, callers: int, seconds: float, floods: bool) -> list[Row]:
    listing = (*_MANAGER, "ListModels")
    of_bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetId")
    alone = measured(address, CAROL, min(seconds, 5), *listing)
    hostile = [
        multiprocessing.Process(target=attack, args=(address, (ALICE, BOB)[n % 2], n, floods), daemon=True)
        for n in range(callers)
    ]
    for process in hostile:
        process.start()
    time.sleep(2)
    beside = measured(address, CAROL, seconds, *listing)
    bus_itself = measured(address, CAROL, seconds / 2, *of_bus)
    still_there = sum(process.is_alive() for process in hostile)
    for process in hostile:
        process.terminate()
        process.join()
    assert still_there == callers, f"{callers - still_there} callers ended"
    return [
        cost_row("list_alone_p99", [percentile(alone, 99)], "s"),
        cost_row("list_p50", [percentile(beside, 50)], "s"),
        cost_row("list_p99", [percentile(beside, 99)], "s", LIMIT_S),
        cost_row("list_longest", [max(beside)], "s"),
        cost_row("bus_p99", [percentile(bus_itself, 99)], "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--callers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--floods", action="store_true", help="bursts as well, whose answers nobody waits for")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root, to be several users")
    rows = asyncio.run(run(chosen.callers, chosen.seconds, chosen.models, chosen.floods))
    result = report("hostile", f"sudo tests/bench/hostile.py --models {chosen.models}", rows)
    print(result.to_json() if chosen.json else result.to_text())


if __name__ == "__main__":
    main()
