# SPDX-License-Identifier: Apache-2.0
"""Faults as in faults.py, fewer but in a whole daemon, with a client on the bus.

Each case kills the daemon at one call that changes a file, or has that call fail, while a client imports, replaces,
names, pins, hides or removes a model. Then what the bus says, what the disk holds and
what a restart finds must be one state, the one before or the one after, and every model must be leased with its bytes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from campaign import Campaign, main
from faults import COUNT, MODES, SHIM, Faults, leftovers, on_disk, taken_bytes
from running import CONFIG, Daemon

import flashd
from flashd.client.client import Client
from flashd.dbus.private_bus import PrivateBus
from flashd.errors import FlashdError, Internal

# name: (letter of its weights, pinned, private, aliases)
State = dict[str, tuple[str, bool, bool, tuple[str, ...]]]
BEFORE: State = {"a": ("A", False, False, ()), "b": ("B", False, False, ("bee",)), "gone": ("C", False, False, ())}


def _changed(**changes: tuple[str, bool, bool, tuple[str, ...]] | None) -> State:
    return {name: value for name, value in {**BEFORE, **changes}.items() if value is not None}


class Cases:
    """One daemon, and a client of it."""

    def __init__(self, campaign: Campaign, folder: Path, bus: PrivateBus) -> None:
        self._campaign = campaign
        self._folder = folder
        self._sources = folder / "sources"
        control = folder / "control"
        control.write_bytes(bytes(4096))
        shim = folder / "faults.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, SHIM, "-ldl"], check=True)
        self._faults = Faults(control)
        self._daemon = Daemon(bus.address, folder, folder)
        self._daemon.config.write_text(CONFIG + '[streamer]\nbackend = "threads"\n')  # the shim sees no io_uring
        self._preload = {
            "LD_PRELOAD": str(shim), "FAULTS_CONTROL": str(control), "FAULTS_ROOT": str(self._daemon.state),
        }  # fmt: skip
        self._data: dict[str, bytes] = {}
        self._letters: dict[str, str] = {}  # of checkpoints
        self._counts: dict[str, int] = {}
        self._client: Client | None = None
        for seed, letter in enumerate("ABCD"):
            (self._sources / letter).mkdir(parents=True)
            weights = {"w": np.random.default_rng(seed).standard_normal((32, 32), np.float32)}
            safetensors.numpy.save_file(weights, self._sources / letter / "model.safetensors")
            (self._sources / letter / "config.json").write_text("{}")
            self._data[letter] = weights["w"].tobytes()
        self.operations: Mapping[str, tuple[Callable[[], object], State]] = {
            "import": (lambda: self._import("D", "new"), _changed(new=("D", False, False, ()))),
            "replace": (lambda: self._import("D", "a"), _changed(a=("D", False, False, ()))),
            "same again": (lambda: self._import("A", "a"), BEFORE),
            "pin": (lambda: self.client.pin("a"), _changed(a=("A", True, False, ()))),
            "alias": (lambda: self.client.set_aliases("a", ["x"]), _changed(a=("A", False, False, ("x",)))),
            "private": (lambda: self.client.set_private("a", True), _changed(a=("A", False, True, ()))),
            "remove": (self._remove, _changed(gone=None)),
        }

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = flashd.connect(self._daemon.address)
        return self._client

    def start(self) -> None:
        os.environ.update(self._preload)
        try:
            self._daemon.start()
        finally:
            for name in self._preload:
                del os.environ[name]

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        process = self._daemon.process
        if process is not None:
            process.kill()
            process.wait()

    def prepare(self) -> None:
        self.start()
        self._reset()
        for letter, name in (("A", "a"), ("B", "b"), ("C", "gone"), ("D", "spare")):
            self._letters[self.client.model(name).checkpoint if name != "spare" else self._import(letter, name)] = (
                letter
            )
        self.client.remove("spare")

    def one(self) -> None:
        name = self._campaign.random.choice(list(self.operations))
        mode = self._campaign.random.choice(list(MODES))
        self._reset()
        if name not in self._counts:
            self._faults.arm(COUNT)
            self._done(name)
            self._counts[name] = self._faults.disarm()[0]
            self._reset()
        number = self._campaign.random.randint(1, self._counts[name])
        self._faults.arm(MODES[mode][0], number, MODES[mode][1])
        result = self._done(name)
        _, hits, last = self._faults.disarm()
        self._campaign.count("executions")
        self._campaign.count("faults", min(hits, 1))
        where = f"{name}, {mode} at call {number} ({last}): {result}"
        wanted = [self.operations[name][1]] if result == "done" else [BEFORE, self.operations[name][1]]
        process = self._daemon.process
        assert process is not None
        if MODES[mode][1] == 0 and hits:
            process.wait()
            self._client = None
        else:
            if process.poll() is not None:
                self._campaign.finding(f"{where}; the daemon died")
                self._client = None
            for words in self._wrong(wanted) if process.poll() is None else ():
                self._campaign.finding(f"{where}; {words}")
        self.stop()
        self.start()
        for words in self._wrong(wanted):
            self._campaign.finding(f"{where}; after a restart, {words}")
        if "Traceback" in (log := self._daemon.log.read_text()):
            self._campaign.finding(f"{where}; {log[log.index('Traceback') :][:3000]}")
        self._daemon.log.write_text("")

    def _done(self, name: str) -> str:
        try:
            self.operations[name][0]()
        except Internal as error:
            self._campaign.finding(f"{name}: {error}")
            return str(error)
        except FlashdError as error:
            return str(error)
        return "done"

    def _wrong(self, wanted: list[State]) -> Iterator[str]:
        with contextlib.suppress(FlashdError):
            self.client.collect()  # the daemon's background work is done then
        models = self.client.models()
        there = {m.name: (self._letters[m.checkpoint], m.pinned, m.private, m.aliases) for m in models}
        if there not in wanted:
            yield f"{there} is none of {wanted}"
        store = self._daemon.state / "store"
        disk = {
            m.name: (self._letters[m.checkpoint_id], m.pinned, m.private, m.aliases) for m in on_disk(store).values()
        }
        if there != disk:
            yield f"the bus has {there}, the disk {disk}"
        if (size := self.client.status().store_bytes) != (taken := taken_bytes(store / "checkpoints")):
            yield f"{size} bytes count and {taken} are taken"
        if found := leftovers(store):
            yield f"{', '.join(found)} was left behind"
        for name, (letter, *_) in there.items():
            with self.client.lease(name) as lease:
                if bytes(lease.buffer)[: len(self._data[letter])] != self._data[letter]:
                    yield f"{name} has other bytes"

    def _import(self, letter: str, name: str) -> str:
        return self.client.import_(self._sources / letter, name).checkpoint

    def _remove(self) -> None:
        self.client.remove("gone")
        self.client.collect()

    def _reset(self) -> None:
        """The state before each case."""
        there = {model.name: model for model in self.client.models()}
        for name in there.keys() - BEFORE.keys():
            self.client.remove(name)
        for name, (letter, *_, aliases) in BEFORE.items():
            model = there.get(name)
            if model is None or self._letters.get(model.checkpoint) != letter:
                model = self.client.import_(self._sources / letter, name)
            if model.pinned:
                self.client.unpin(name)
            if model.private:
                self.client.set_private(name, False)
            if model.aliases != aliases:
                self.client.set_aliases(name, aliases)
        self.client.collect()


def run(campaign: Campaign) -> None:
    with tempfile.TemporaryDirectory(prefix="fd-") as name, PrivateBus(Path(name)) as bus:
        cases = Cases(campaign, Path(name), bus)
        try:
            cases.prepare()
            while campaign.goes_on():
                cases.one()
        finally:
            cases.stop()


if __name__ == "__main__":
    main(run, whole_s=900)
