# SPDX-License-Identifier: Apache-2.0
"""Kills the store at every mutating system call, or fails that call, and compares memory, disk and a restart.

Each operation is run once to count its calls; then, for each call and each kind of fault, once more in a child process
whose calls pass through faults.c. Afterwards the store must be in the state before the operation or in the one after
it, in memory, on disk and after a restart: nothing lost, half made, uncounted, or of other bytes. Where the disk did
not confirm a change, a power cut is played as well: the old records come back, and all that they name must be there.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import mmap
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from campaign import Campaign, main

from flashd.checkpoint.convert import convert
from flashd.checkpoint.files import verify
from flashd.checkpoint.source.reader import SourceFiles
from flashd.config import loading
from flashd.config.paths import Paths
from flashd.daemon.lifecycle.settings import Settings
from flashd.durable import discard, read_toml, writing
from flashd.errors import FlashdError, StoreFull, TransferFailed
from flashd.io.streamer import Backend, Options, blake3
from flashd.store.catalog import Catalog, Model, Origin
from flashd.store.known_sources import KnownSources
from flashd.units import GiB, MiB

SHIM = Path(__file__).with_name("faults.c")
QUOTA_BYTES = 4 * GiB
COUNT, KILL_BEFORE, KILL_AFTER, FAIL_ONCE, FAIL_FROM_THERE = range(5)
MODES: Mapping[str, tuple[int, int]] = {
    "killed before": (KILL_BEFORE, 0),
    "killed after": (KILL_AFTER, 0),
    "EIO once": (FAIL_ONCE, errno.EIO),
    "ENOSPC from there on": (FAIL_FROM_THERE, errno.ENOSPC),
    "EROFS from there on": (FAIL_FROM_THERE, errno.EROFS),
    "EACCES from there on": (FAIL_FROM_THERE, errno.EACCES),
}
KEY = "e" * 64  # the image's key


class Faults:
    """What this process and its children share with the shim in them."""

    _WORDS = struct.Struct("=7i")  # armed, at, action, error, count, hits, of syncs only
    _LAST = slice(32, 288)

    def __init__(self, control: Path) -> None:
        with control.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 4096)

    def arm(self, action: int, at: int = 0, error: int = 0, *, syncs_only: bool = False) -> None:
        self._memory[self._LAST] = bytes(256)
        self._memory[: self._WORDS.size] = self._WORDS.pack(1, at, action, error, 0, 0, syncs_only)

    def disarm(self) -> tuple[int, int, str]:
        """How many calls there were, how many were hit, and which was the last of these."""
        self._memory[:4] = bytes(4)
        _, _, _, _, count, hits, _ = self._WORDS.unpack(self._memory[: self._WORDS.size])
        return count, hits, self._memory[self._LAST].split(b"\0")[0].decode()


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done to a store, in a child process; `prepare` makes the state before it."""

    do: Callable[[Stage], None]
    prepare: Callable[[Stage], None] = lambda stage: None


@dataclass(slots=True)
class Stage:
    """The folder that everything happens in, and what is in memory of it. `sources` lies beside it."""

    root: Path
    sources: Path
    quota_bytes: int = QUOTA_BYTES
    _catalog: Catalog | None = None
    _removed_sources: KnownSources | None = None

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def paths(self) -> Paths:
        return Paths(self.root / "flashd.toml", self.root, self.root / "run", self.root / "models")

    @property
    def catalog(self) -> Catalog:
        if self._catalog is None:
            self._catalog = Catalog(self.store, quota_bytes=self.quota_bytes, keep_versions=1)
        return self._catalog

    @property
    def removed_sources(self) -> KnownSources:
        if self._removed_sources is None:
            self._removed_sources = KnownSources(self.root / "dismissed.toml", "removed models may come back")
        return self._removed_sources

    def close(self) -> None:
        if self._catalog is not None:
            self._catalog.close()
        self._catalog = self._removed_sources = None

    def add(self, name: str, source: str, need_bytes: int = MiB, **options: Any) -> Model:
        with SourceFiles.from_path(self.sources / source) as files, self.catalog.draft(need_bytes) as draft:
            options_ = Options(backend=Backend.THREADS)  # the shim sees no io_uring
            manifest = convert(files, draft.directory, python=sys.executable, options=options_)
            return draft.publish(name, manifest, Origin("import", source), **options)

    def add_image(self, name: str) -> None:
        """As an engine does that has loaded a model."""
        model = self.catalog.resolve(name)
        checkpoint = self.catalog.checkpoint(model.checkpoint_id)
        size_bytes = checkpoint.manifest.data_bytes
        image = self.catalog.images.describe(KEY, checkpoint.layout_json(), size_bytes, checkpoint.id)
        data = checkpoint.weights_path.read_bytes()[checkpoint.manifest.data_offset :]
        with self.catalog.images.draft(image) as draft, writing(image.directory):
            os.pwrite(draft.file.fd, data, image.manifest.data_offset)
            os.fsync(draft.file.fd)
            draft.publish(blake3(data))

    def fill(self) -> None:
        """The state before every operation."""
        self.add("a", "A")
        self.add("b", "B")
        self.add("b", "C")
        self.add("twin", "A with a template")
        self.add("gone", "D")
        self.catalog.set_aliases("b", ["bee"])
        self.removed_sources.add("/models/x", "1")
        loading.set_value(self.paths, "engines.max_parked", "3")


def _remove_and_collect(stage: Stage) -> None:
    stage.catalog.remove("gone")
    _collect(stage)


def _collect(stage: Stage) -> None:
    failure = stage.catalog.collect(()).failure
    if failure is not None:
        raise failure


def _import_into_quota(stage: Stage) -> None:
    """Room has to be made: the image goes."""
    stage.catalog.quota_bytes = stage.catalog.size_bytes() + stage.catalog.images.size_bytes() + 4096
    stage.add("new", "E", need_bytes=8192)


def _refused_by_quota(stage: Stage) -> None:
    stage.catalog.quota_bytes = stage.catalog.size_bytes()
    with contextlib.suppress(StoreFull):
        stage.add("new", "E", need_bytes=GiB)


def _garbage(stage: Stage) -> None:
    """Old versions, removed models, and what a crash leaves."""
    for source in ("A", "D", "E"):
        stage.add("b", source)
    stage.catalog.remove("gone")
    (stage.store / "partial" / "left").mkdir()
    (stage.store / "partial" / "left" / "model.safetensors").write_bytes(bytes(5000))


def _damaged_record(stage: Stage) -> None:
    (stage.store / "models" / "gone.toml").write_text("gone = [")
    (stage.store / "models" / "b.toml.partial").write_text("half")
    _crash(stage)


def _crash(stage: Stage) -> None:
    (stage.store / "partial" / "left").mkdir()
    (stage.store / "partial" / "left" / "model.safetensors").write_bytes(bytes(5000))


OPERATIONS: Mapping[str, Operation] = {
    "import": Operation(lambda stage: stage.add("new", "E", aliases=["other"], private=True) and None),
    "replace": Operation(lambda stage: stage.add("a", "E") and None),
    "same again": Operation(lambda stage: stage.add("a", "A") and None),
    "equal weights": Operation(lambda stage: stage.add("new", "D with a template") and None),
    "alias": Operation(lambda stage: stage.catalog.set_aliases("a", ["x", "y"]) and None),
    "pin": Operation(lambda stage: stage.catalog.set_pinned("a", True) and None),
    "private": Operation(lambda stage: stage.catalog.set_private("a", True) and None),
    "use": Operation(lambda stage: stage.catalog.touch("a", swapped=True) and None),
    "remove": Operation(lambda stage: stage.catalog.remove("gone")),
    "remove and collect": Operation(_remove_and_collect),
    "collect": Operation(_collect, _garbage),
    "quota": Operation(_import_into_quota, lambda stage: stage.add_image("a")),
    "over quota": Operation(_refused_by_quota, lambda stage: stage.add_image("a")),
    "image": Operation(lambda stage: stage.add_image("a")),
    "image again": Operation(lambda stage: stage.add_image("a"), lambda stage: stage.add_image("a")),
    "drop image": Operation(lambda stage: stage.catalog.images.drop(KEY), lambda stage: stage.add_image("a")),
    "start": Operation(lambda stage: stage.catalog and None, _damaged_record),
    "dismiss": Operation(lambda stage: stage.removed_sources.add("/models/y", "2")),
    "setting": Operation(lambda stage: loading.set_value(stage.paths, "engines.max_parked", "4") and None),
}


@dataclass(slots=True)
class Seen:
    """A store as it is: what each model is made of, and what else is kept."""

    models: dict[str, Any]
    dismissed: dict[str, str]
    setting: Any

    def is_like(self, other: Seen) -> bool:
        """Whether they are one state: how many old versions are kept yet is not a part of it."""
        return self._without_versions() == other._without_versions()

    def _without_versions(self) -> Seen:
        return replace(self, models={name: replace(model, previous=()) for name, model in self.models.items()})

    def __str__(self) -> str:
        models = ", ".join(
            f"{m.name}={m.checkpoint_id[:6]}+{len(m.previous)}{'p' * m.pinned}{'P' * m.private} {'/'.join(m.aliases)}"
            for _, m in sorted(self.models.items())
        )
        return f"[{models}; {self.dismissed}; {self.setting}]"

    @classmethod
    def of(cls, stage: Stage) -> Seen:
        """In memory; of times, which differ at every run, nothing."""
        models = {m.name: replace(m, created_at=0.0, last_used_at=0.0) for m in stage.catalog.models()}
        loaded = Settings(stage.paths, {}).current
        _ = stage.removed_sources
        with contextlib.suppress(FileNotFoundError):
            return cls(models, read_toml(stage.root / "dismissed.toml"), loaded.engines.max_parked)
        return cls(models, {}, loaded.engines.max_parked)


@dataclass(slots=True)
class Report:
    """What a child process found."""

    result: str = ""
    seen: Seen | None = None
    in_the_end: Seen | None = None  # after collecting
    wrong: list[str] = field(default_factory=list)
    unconfirmed: bool = False


def on_disk(store: Path) -> dict[str, Model]:
    """What a restart would make of the records."""
    found = {}
    for path in (store / "models").glob("*.toml"):
        with contextlib.suppress(ValueError):
            model = Model.from_toml(path.read_text())
            there = tuple(i for i in model.previous if (store / "checkpoints" / i).is_dir())
            found[model.name] = replace(model, previous=there)
    return found


def taken_bytes(*folders: Path) -> int:
    """Hard links once."""
    files = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                status = path.stat()
                files[status.st_ino] = status.st_size
    return sum(files.values())


def differences(stage: Stage) -> Iterator[str]:
    """Where memory and disk are not one state."""
    catalog, store = stage.catalog, stage.store
    memory, disk = {model.name: model for model in catalog.models()}, on_disk(store)
    if memory != disk:
        yield f"memory has {sorted(memory.items())}, the disk {sorted(disk.items())}"
    if catalog.size_bytes() != (taken := taken_bytes(store / "checkpoints")):
        yield f"checkpoints count as {catalog.size_bytes()} bytes and take {taken}"
    if catalog.images.size_bytes() != (taken := taken_bytes(store / "images")):
        yield f"images count as {catalog.images.size_bytes()} bytes and take {taken}"
    catalog.quota_bytes = QUOTA_BYTES
    free_bytes = QUOTA_BYTES - taken_bytes(store / "checkpoints", store / "images", store / "partial")
    if catalog.free_bytes() > free_bytes:
        yield f"{catalog.free_bytes()} bytes of the quota count as free, and {free_bytes} are"
    for model in memory.values():
        for checkpoint_id in model.versions():
            try:
                verify(catalog.checkpoint(checkpoint_id))
            except FlashdError as error:
                yield f"{model.name}: {error}"
    if catalog.images.is_stored(KEY) and (image := catalog.images.get(KEY)) is not None:
        try:
            image.header()
            image.digests()
        except FlashdError as error:
            yield f"the image: {error}"


def leftovers(folder: Path) -> list[str]:
    """What was not completed."""
    found = [p for p in folder.rglob("*") if p.suffix in {".partial", ".shared"} or p.parent.name == "partial"]
    return [str(path.relative_to(folder)) for path in found]


def collected(stage: Stage) -> Iterator[str]:
    """The store after a collection."""
    if (failure := stage.catalog.collect(()).failure) is not None:
        yield f"nothing ails the disk any more, and collecting fails: {failure}"
    needed = {version for model in stage.catalog.models() for version in model.versions()}
    there = {path.name for path in (stage.store / "checkpoints").iterdir()}
    if stage.catalog.damaged():
        there &= needed  # while a record is damaged, more is kept
    if there != needed:
        yield f"{sorted(there ^ needed)} is missing, or is kept and needed by nobody"
    yield from differences(stage)
    if found := leftovers(stage.store):
        yield f"{', '.join(found)} was left behind"


def faulted(stage: Stage, operation: Operation, faults: Faults, mode: tuple[int, int], number: int) -> Report:
    """Runs the operation with one fault, and looks at what came of it."""
    report = Report()
    if operation is not OPERATIONS["start"]:
        _ = stage.catalog, stage.removed_sources
    faults.arm(mode[0], number, mode[1])
    try:
        operation.do(stage)
        report.result = "done"
    except (TransferFailed, StoreFull) as error:
        report.result = str(error)
        report.unconfirmed = "did not confirm" in report.result
    except Exception:  # noqa: BLE001 -- which is what we are looking for
        report.result = traceback.format_exc()
        report.wrong.append(f"an error that is nobody's words: {report.result}")
    _, hits, _ = faults.disarm()
    if mode[0] != COUNT and not hits:
        return report
    report.wrong += [f"afterwards, {words}" for words in differences(stage)]
    report.seen = Seen.of(stage)
    if report.unconfirmed:
        faults.arm(FAIL_FROM_THERE, 1, errno.EIO, syncs_only=True)
        stage.catalog.collect(())  # a disk that goes on confirming nothing
        faults.disarm()
    else:
        report.wrong += [f"after collecting, {words}" for words in collected(stage)]
        report.in_the_end = Seen.of(stage)
    stage.close()
    return report


def restarted(stage: Stage) -> Report:
    """A new start, a look at everything, and a collection."""
    report = Report("restarted")
    report.wrong += [f"after a restart, {words}" for words in differences(stage)]
    report.seen = Seen.of(stage)
    report.wrong += [f"after a restart and collecting, {words}" for words in collected(stage)]
    report.wrong += [f"{path} is still there after a restart" for path in leftovers(stage.root)]
    stage.close()
    return report


def in_child(work: Callable[[], Report]) -> Report | None:
    """What it reports; None if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            report = work()
        except BaseException:  # noqa: BLE001 -- the boundary of a process
            report = Report("failed", wrong=[traceback.format_exc()])
        with os.fdopen(writer, "wb") as file:
            pickle.dump(report, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        raw = file.read()
    os.waitpid(child, 0)
    return pickle.loads(raw) if raw else None


class Runs:
    """All operations on one folder, again and again."""

    def __init__(self, campaign: Campaign, scratch: Path, faults: Faults) -> None:
        self._campaign = campaign
        self._scratch = scratch
        self._faults = faults
        self._stage = Stage(scratch / "root", scratch / "sources")
        self._before: dict[str, Seen] = {}
        self._after: dict[str, Seen] = {}

    def prepare(self, names: list[str]) -> list[tuple[str, str, int]]:
        """Makes what each operation begins with, runs it without a fault, and returns every fault there is for it."""
        self._make_sources()
        (self._scratch / "root").mkdir()
        self._in_place(self._stage.fill)
        self._keep("filled")
        points = []
        for name in names:
            operation = OPERATIONS[name]
            self._restore("filled")
            self._in_place(lambda operation=operation: operation.prepare(self._stage))
            self._keep(name)
            self._before[name] = self._look(name, restarted) if name == "start" else self._in_memory()
            self._restore(name)
            done = in_child(lambda operation=operation: faulted(self._stage, operation, self._faults, (COUNT, 0), 0))
            count = self._faults.disarm()[0]
            self._campaign.count("executions")
            if done is None or done.seen is None or done.result != "done" or done.wrong:
                self._campaign.finding(f"{name}, with no fault: {done}")
                continue
            self._after[name] = done.seen
            points += [(name, mode, number) for mode in MODES for number in range(1, count + 1)]
        return points

    def try_one(self, name: str, mode: str, number: int) -> None:
        operation, campaign = OPERATIONS[name], self._campaign
        self._restore(name)
        report = in_child(lambda: faulted(self._stage, operation, self._faults, MODES[mode], number))
        _, hits, last = self._faults.disarm()
        campaign.count("executions")
        if not hits:
            return
        campaign.count("kills" if report is None else "faults", 1)
        where = f"{name}, {mode} at call {number} ({last})"
        wrong = list(report.wrong) if report else []
        if report is not None and report.unconfirmed:
            self._power_cut(name, where)
            return
        again = in_child(lambda: restarted(self._stage))
        wrong += again.wrong if again else ["the restart died"]
        states = [report.seen if report else None, again.seen if again else None]
        if report is not None and report.result == "done" and hits and name not in {"start", "drop image", "dismiss"}:
            allowed = [self._after[name]]
        else:
            allowed = [self._before[name], self._after[name]]
        for state in states:
            if state is not None and not any(state.is_like(other) for other in allowed):
                wrong.append(f"{state} is none of {', '.join(map(str, allowed))}")
        if report and again and report.in_the_end and report.in_the_end != again.seen:
            wrong.append(f"a restart finds {again.seen}, and there was {report.in_the_end}")
        for words in wrong:
            campaign.finding(f"{where}: {report.result if report else 'killed'}; {words}")

    def _power_cut(self, name: str, where: str) -> None:
        """The records are again as they were before the change that the disk did not confirm."""
        now, before = self._stage.store / "models", self._scratch / "states" / name / "store" / "models"
        kept = in_child(lambda: restarted(self._stage)) if self._campaign.random.random() < 0.5 else None
        if kept is None:
            discard(now)
            shutil.copytree(before, now)
            kept = in_child(lambda: restarted(self._stage))
        self._campaign.count("power cuts")
        states = [self._before[name], self._after[name]]
        wrong = ["the restart died"] if kept is None else kept.wrong
        if kept is not None and kept.seen is not None and not any(kept.seen.is_like(state) for state in states):
            wrong.append(f"{kept.seen} is none of {', '.join(map(str, states))}")
        for words in wrong:
            self._campaign.finding(f"{where}: not confirmed, and then a power cut; {words}")

    def _make_sources(self) -> None:
        for seed, name in enumerate("ABCDE"):
            weights = {"w": np.random.default_rng(seed).standard_normal((32, 32), np.float32)}
            for suffix, template in (("", ""), (" with a template", "{{ x }}")):
                folder = self._stage.sources / f"{name}{suffix}"
                folder.mkdir(parents=True)
                safetensors.numpy.save_file(weights, folder / "model.safetensors")
                (folder / "config.json").write_text("{}")
                if template:
                    (folder / "chat_template.jinja").write_text(template)

    def _in_place(self, work: Callable[[], None]) -> None:
        def in_it() -> Report:
            work()
            self._stage.close()
            return Report("prepared")

        done = in_child(in_it)
        if done is None or done.wrong:
            raise SystemExit(f"cannot be prepared: {done}")

    def _in_memory(self) -> Seen:
        def look() -> Report:
            return Report("seen", Seen.of(self._stage))

        done = in_child(look)
        assert done is not None and done.seen is not None, done
        return done.seen

    def _look(self, name: str, how: Callable[[Stage], Report]) -> Seen:
        self._restore(name)
        done = in_child(lambda: how(self._stage))
        assert done is not None and done.seen is not None, done
        return done.seen

    def _keep(self, name: str) -> None:
        to = self._scratch / "states" / name
        to.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", self._stage.root, to], check=True, env={})

    def _restore(self, name: str) -> None:
        discard(self._stage.root)
        subprocess.run(["cp", "-a", self._scratch / "states" / name, self._stage.root], check=True, env={})


def run(campaign: Campaign) -> None:
    if "FAULTS_CONTROL" not in os.environ:
        _run_again_with_the_shim(campaign)
    logging.disable(logging.CRITICAL)
    control = Path(os.environ["FAULTS_CONTROL"])
    try:
        runs = Runs(campaign, control.parent, Faults(control))
        points = runs.prepare(campaign.options.operations or list(OPERATIONS))
        campaign.count("points", len(points))
        campaign.random.shuffle(points)
        for point in points:
            if not campaign.goes_on():
                break
            runs.try_one(*point)
    finally:
        discard(control.parent)


def _run_again_with_the_shim(campaign: Campaign) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="flashd-faults-"))
    shim, control = scratch / "faults.so", scratch / "control"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, SHIM, "-ldl"], check=True)
    control.write_bytes(bytes(4096))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "FAULTS_CONTROL": str(control),
        "FAULTS_ROOT": str(scratch / "root"),
    }
    os.execve(sys.executable, [sys.executable, *sys.argv, "--seed", str(campaign.seed)], environment)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(OPERATIONS)}; default all")


if __name__ == "__main__":
    main(run, arguments=_arguments)
