# SPDX-License-Identifier: Apache-2.0
"""Damages a state folder at random, then starts on it: what was not damaged is served, and what was is named.

Files are flipped, cut, emptied, filled with what a parser fears, exchanged for each other, for folders, links and
pipes. Most cases open the state in a child process, which must not hang; some start a daemon and look over the bus.
Never may other bytes be served than a model's own, nor may the damage of one model cost another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from campaign import Campaign, main
from faults import Report, Stage, in_child
from running import Daemon

import flashd
from flashd.checkpoint.files import verify
from flashd.config import loading
from flashd.daemon.events import Events
from flashd.daemon.lifecycle.problems import Problems
from flashd.dbus.private_bus import PrivateBus
from flashd.engines.environments import Environments
from flashd.errors import FlashdError
from flashd.store.known_sources import KnownSources

HANGS_S = 60
WITH_A_DAEMON = 0.05  # of the cases
MODELS = {"a": "A", "b": "C", "twin": "A with a template", "gone": "D"}
VALUES = (
    *(
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "9" * 4400,
        "9" * 30,
        "1e308",
        "true",
        '""',
        "[]",
        "{}",
        '"\\u0000"',
        '"\\u202e"',
    ),
    *("[" * 3000, "[" * 3000 + "]" * 3000, '"' + "x" * 100_000 + '"', '"../../etc/passwd"', '["a", 1]', "1979-05-27"),
    *("0x" + "f" * 500, '"' + "f" * 64 + '"', "{a={a={a=1}}}"),
)
CONTENTS = (
    *(
        b"",
        b"\0",
        b"\xff\xfe",
        b"x",
        b"[" * 5000,
        b"a=" + b"[" * 5000,
        b"a." * 5000 + b"b=1",
        b"{" * 5000,
        b"\n" * 100_000,
    ),
    *(b"a=" + b"9" * 4400, b"\xef\xbb\xbf", b"#" * 20_000_000),
)
NAMES = ("x.toml", "x.partial", "x.damaged", "\udcff.toml", "-rf", "lock", "a.toml.partial", "f" * 64, "e" * 64)


class Damages:
    """Ways to damage a file or folder; each says what it did."""

    def __init__(self, chance: random.Random, state: Path) -> None:
        self._chance = chance
        self._state = state

    def one(self, path: Path) -> str:
        """Damages what lies at a path, in a way that suits it."""
        ways = [self._removed, self._other_kind, self._exchanged, self._beside]
        if path.is_file() and not path.is_symlink():
            ways += [self._flipped, self._cut, self._longer, self._content, self._copied] * 2
            if path.suffix == ".toml":
                ways += [self._value] * 12
        return self._chance.choice(ways)(path)

    def _removed(self, path: Path) -> str:
        _remove(path)
        return "removed"

    def _other_kind(self, path: Path) -> str:
        _remove(path)
        kinds: Mapping[str, Callable[[], object]] = {
            "a folder": path.mkdir,
            "a folder with something in it": lambda: (path / "a" / "b").mkdir(parents=True),
            "a deep folder": lambda: _deep(path),
            "a file": lambda: path.write_bytes(b"x"),
            "a link that leads nowhere": lambda: path.symlink_to("/nowhere"),
            "a link to itself": lambda: path.symlink_to(path.name),
            "a pipe": lambda: os.mkfifo(path),
            "a large hole": lambda: _hole(path),
        }
        kind = self._chance.choice(list(kinds))
        kinds[kind]()
        return f"is {kind}"

    def _exchanged(self, path: Path) -> str:
        others = [other for other in path.parent.iterdir() if other != path]
        if not others:
            return self._removed(path)
        other, aside = self._chance.choice(others), path.with_name("aside")
        path.rename(aside)
        other.rename(path)
        aside.rename(other)
        return f"exchanged for {other.name}"

    def _copied(self, path: Path) -> str:
        """Over it, as a restored backup of something else."""
        others = [p for p in self._state.rglob(path.name) if p != path and p.is_file()] or [path]
        content = self._chance.choice(others).read_bytes()
        _remove(path)
        path.write_bytes(content)
        return "is another's"

    def _beside(self, path: Path) -> str:
        beside = path.parent / self._chance.choice(NAMES)
        if os.path.lexists(beside):
            return self._removed(path)
        with contextlib.suppress(OSError):
            self._chance.choice([beside.mkdir, lambda: os.mkfifo(beside), lambda: beside.write_bytes(b"x")])()
        return f"has {beside.name!r} beside it"

    def _flipped(self, path: Path) -> str:
        content = bytearray(path.read_bytes())
        if not content:
            return self._longer(path)
        at = self._chance.randrange(len(content))
        content[at] ^= 1 << self._chance.randrange(8)
        path.write_bytes(content)
        return f"bit flipped in byte {at}"

    def _cut(self, path: Path) -> str:
        size_bytes = self._chance.randrange(path.stat().st_size + 1)
        os.truncate(path, size_bytes)
        return f"cut to {size_bytes} bytes"

    def _longer(self, path: Path) -> str:
        with path.open("ab") as file:
            file.write(self._chance.randbytes(self._chance.randrange(1, 10_000)))
        return "longer"

    def _content(self, path: Path) -> str:
        content = self._chance.choice(CONTENTS)
        path.write_bytes(content)
        return f"is {content[:20]!r}... of {len(content)} bytes"

    def _value(self, path: Path) -> str:
        lines = path.read_text(errors="surrogateescape").split("\n")
        with_values = [n for n, line in enumerate(lines) if re.match(r'[\w".-]+ = ', line)]
        if not with_values:
            return self._content(path)
        number, value = self._chance.choice(with_values), self._chance.choice(VALUES)
        key = lines[number].partition(" = ")[0]
        lines[number] = f"{key} = {value}"
        path.write_text("\n".join(lines), errors="surrogateescape")
        return f"{key} = {value[:40]}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _deep(path: Path) -> None:
    path.mkdir()
    for _ in range(300):
        path = path / "deeper"
        path.mkdir()


def _hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 100 << 20)


class Cases:
    """One state, damaged again and again."""

    def __init__(self, campaign: Campaign, scratch: Path) -> None:
        self._campaign = campaign
        self._whole = scratch / "whole"
        self._stage = Stage(scratch / "root" / "state", scratch / "sources")
        self._data: dict[str, bytes] = {}
        self._files: dict[str, set[int]] = {}  # inodes that a model needs
        self._bus_folder = scratch

    def prepare(self) -> None:
        for seed, name in enumerate("ABCDE"):
            weights = {"w": np.random.default_rng(seed).standard_normal((32, 32), np.float32)}
            for suffix in ("", " with a template"):
                folder = self._stage.sources / f"{name}{suffix}"
                folder.mkdir(parents=True)
                safetensors.numpy.save_file(weights, folder / "model.safetensors")
                (folder / "config.json").write_text("{}")
                if suffix:
                    (folder / "chat_template.jinja").write_text("{{ x }}")
            self._data[name] = weights["w"].tobytes()
        self._stage.root.mkdir(parents=True)

        def fill() -> Report:
            stage = self._stage
            stage.fill()
            stage.add_image("a")
            book = self._handed_over()
            (stage.root / "handed-over.toml").write_text('"/x" = "1"\n')
            assert book
            environment = stage.root / "environments" / "torch" / "1"
            environment.mkdir(parents=True)
            (environment / "environment.toml").write_text(
                'version = "2"\npython = "3.11"\nsize_bytes = 5\ncreated_at = 1.5\nwheels = []\n'
            )
            (environment.parent / "current").symlink_to("1")
            stage.close()
            return Report("filled")

        filled = in_child(fill)
        assert filled is not None and not filled.wrong, filled
        subprocess.run(["cp", "-a", self._stage.root, self._whole], check=True)

    def one(self) -> None:
        shutil.rmtree(self._stage.root)
        subprocess.run(["cp", "-a", self._whole, self._stage.root], check=True)
        files_of = self._needed_files()
        words, touched = [], set()
        for _ in range(self._campaign.random.choice((1, 1, 1, 2, 4))):
            paths = [p for p in self._stage.root.rglob("*") if "deeper" not in p.parts and p != self._stage.store]
            if not paths:
                break
            path = self._campaign.random.choice(sorted(paths))
            damaged = Damages(self._campaign.random, self._stage.root)
            words.append(f"{path.relative_to(self._stage.root)}: {damaged.one(path)}")
        after = self._needed_files()
        touched = {name for name in MODELS if files_of[name] != after[name]}
        self._campaign.count("executions")
        where = "; ".join(words)
        if self._campaign.random.random() < WITH_A_DAEMON:
            self._campaign.count("daemons")
            wrong = self._with_a_daemon(touched)
        else:
            report = in_child(lambda: self._opened(touched))
            wrong = ["it hung, or died"] if report is None else report.wrong
        for found in wrong:
            self._campaign.finding(f"{where}: {found}")

    def _handed_over(self) -> KnownSources:
        return KnownSources(self._stage.root / "handed-over.toml", "sources may be handed over again")

    def _needed_files(self) -> dict[str, object]:
        """What each model consists of: its record, and the files of its checkpoint, as they are."""
        found: dict[str, object] = {}
        store = self._stage.store
        for name in MODELS:
            record = self._whole / "store" / "models" / f"{name}.toml"
            (checkpoint_id,) = re.findall(r'^checkpoint_id = "(\w+)"', record.read_text(), re.MULTILINE)
            paths = [store / "models" / f"{name}.toml"]
            paths += [
                store / "checkpoints" / checkpoint_id / path.name
                for path in (self._whole / "store" / "checkpoints" / checkpoint_id).iterdir()
            ]
            found[name] = [_content(path) for path in paths]
        return found

    def _opened(self, touched: set[str]) -> Report:
        signal.alarm(HANGS_S)
        stage, report = self._stage, Report("opened")
        with contextlib.suppress(FlashdError):  # settings are a person's: they are refused in words
            loading.load(stage.paths)
        self._handed_over()
        assert stage.removed_sources
        for environment in Environments(stage.root / "environments").all():
            assert int(environment.created_at) >= 0
        report.wrong += self._served(touched)
        problems = Problems(stage.catalog, stage.root, Events()).all(with_names=True)
        if any(name not in {m.name for m in stage.catalog.models()} for name in MODELS) and not problems:
            lost = [name for name in touched if stage.catalog.get(name) is None]
            if any((self._stage.store / "models" / f"{name}.damaged").exists() for name in lost):
                report.wrong.append("a model is gone and nothing is said of it")
        stage.catalog.collect(())
        report.wrong += [f"after collecting, {words}" for words in self._served(touched)]
        for name, source in MODELS.items():
            try:
                stage.add(name, source)
            except FlashdError as error:
                report.wrong.append(f"{name} cannot be imported again: {error}")
        report.wrong += [f"imported again, {words}" for words in self._served(set())]
        stage.close()
        return report

    def _served(self, touched: set[str]) -> list[str]:
        """What is wrong with the models: those that were not `touched` must be there, and others right or refused."""
        wrong = []
        for name, source in MODELS.items():
            model = self._stage.catalog.get(name)
            try:
                if model is None:
                    raise flashd.errors.NotFound("not listed")
                checkpoint = self._stage.catalog.checkpoint(model.checkpoint_id)
                checkpoint.check_side_files()
                verify(checkpoint)
                raw = checkpoint.weights_path.read_bytes()[checkpoint.manifest.data_offset :]
            except FlashdError as error:
                if name not in touched:
                    wrong.append(f"{name}, which was not damaged: {error}")
                continue
            if raw != self._data[source[0]] and (name not in touched or model.checkpoint_id == self._id_of(name)):
                wrong.append(f"{name} has other bytes")
        return wrong

    def _id_of(self, name: str) -> str:
        record = (self._whole / "store" / "models" / f"{name}.toml").read_text()
        return re.findall(r'^checkpoint_id = "(\w+)"', record, re.MULTILINE)[0]

    def _with_a_daemon(self, touched: set[str]) -> list[str]:
        wrong = []
        with tempfile.TemporaryDirectory(prefix="fd-") as name, PrivateBus(Path(name)) as bus:
            daemon = Daemon(bus.address, self._stage.root.parent, Path(name))
            daemon.log.unlink(missing_ok=True)
            try:
                daemon.start()
            except AssertionError:
                return [f"the daemon does not start: {daemon.log.read_text()[-2000:]}"]
            with flashd.connect(bus.address) as client:
                client.status()
                there = {model.name: model for model in client.models()}
                for model, source in MODELS.items():
                    try:
                        with client.lease(model) as lease:
                            data = bytes(lease.buffer)
                    except FlashdError as error:
                        if model not in touched:
                            wrong.append(f"{model}, which was not damaged: {error}")
                        continue
                    if data[: len(self._data["A"])] != self._data[source[0]]:
                        wrong.append(f"{model} is served with other bytes, of {there[model].checkpoint}")
                client.scrub()
            if daemon.stop() != 0:
                wrong.append("the daemon does not end as it should")
            if "Traceback" in (log := daemon.log.read_text()):
                wrong.append(log[log.index("Traceback") :][:3000])
        return wrong


def _content(path: Path) -> object:
    try:
        if not path.is_file():
            return None
        return path.read_bytes() if path.stat().st_size < 1 << 20 else path.stat().st_size
    except OSError as error:
        return error.errno


def run(campaign: Campaign) -> None:
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(1000)
    with tempfile.TemporaryDirectory(prefix="flashd-damage-") as name:
        cases = Cases(campaign, Path(name))
        cases.prepare()
        while campaign.goes_on():
            cases.one()


if __name__ == "__main__":
    main(run, whole_s=1200)
