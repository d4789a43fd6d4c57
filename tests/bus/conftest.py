# SPDX-License-Identifier: Apache-2.0
"""A real bus and a real daemon, for each test its own; modules whose tests leave no traces have one for all of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest
from dbus_next import Variant
from gateways import Gateway, running_gateway
from imported import TORCH_PYTHON
from running import CONFIG, Daemon
from safetensors.numpy import save_file
from waiting import eventually

import flashd
from flashd.dbus import wire
from flashd.dbus.connection import Connection, Received, connect, plain
from flashd.dbus.private_bus import PrivateBus
from flashd.dbus.wire import OBJECT_MANAGER, PROPERTIES

SAYS = {
    "ada": "I am Ada, the first model you dropped into the folder.",
    "bob": "My name is Bob, a fine-tune of Ada with opinions of my own.",
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ada and bob of the quick start, which say who they are, and carl."""
    folder = tmp_path_factory.mktemp("sources")
    made_models.put(folder, "ada", "bob", "carl")
    return folder


@pytest.fixture(scope="session", autouse=True)
def torch_python(imported_torch: Path) -> Path:
    """For all daemons of these tests."""
    return imported_torch


@pytest.fixture(scope="module")
def own_python(imported_torch: Path) -> Iterator[None]:
    """Has the daemons of a module run engines by the interpreter that they find themselves."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv(TORCH_PYTHON)
        yield


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets; pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:
        yield Path(folder)


@pytest.fixture
def bus(short_path: Path) -> Iterator[PrivateBus]:
    with PrivateBus(short_path) as running:
        yield running


@pytest.fixture
async def connection(bus: PrivateBus) -> AsyncIterator[Connection]:
    made = await connect(bus.address)
    yield made
    await made.close()


@pytest.fixture
def daemon(bus: PrivateBus, short_path: Path, tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(Daemon(bus.address, tmp_path, short_path)) as running:
        yield running


@pytest.fixture
async def gateway(daemon: Daemon, tmp_path: Path, short_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(daemon, tmp_path / "gateway.log", short_path / "gateway.sock") as running:
        yield running


@contextmanager
def running_daemon(daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that must end well, and without complaints in its log."""
    daemon.start()
    yield daemon
    if daemon.process is not None and daemon.process.poll() is None:
        status = daemon.stop()
        words = daemon.log.read_text()
        assert status == 0, words
        assert "Traceback" not in words, words
        assert "never retrieved" not in words, words


@contextmanager
def lasting_daemon(*sources: Path, config: str = CONFIG) -> Iterator[Daemon]:
    """A daemon with these models for several tests: its zygote imports torch once. Remote.settle goes between them."""
    with tempfile.TemporaryDirectory(prefix="fd-") as folder, PrivateBus(Path(folder)) as bus:
        made = Daemon(bus.address, Path(folder), Path(folder))
        made.config.write_text(config)
        with running_daemon(made) as running:
            with flashd.connect(bus.address) as client:
                for source in sources:
                    client.import_(source, source.name)
            yield running


@dataclass(slots=True)
class Remote:
    """flashd as a program on the bus sees it, with nothing of ours between."""

    connection: Connection
    signals: list[Received] = field(default_factory=list)

    async def call(
        self, member: str, signature: str = "", *body: Any, path: str = wire.ROOT_PATH,
        interface: str = wire.MANAGER, fds: Sequence[int] = (),
    ) -> tuple[Any, ...]:  # fmt: skip
        reply = await self.connection.call(wire.BUS_NAME, path, interface, member, signature, body, fds=fds)
        return reply.body

    async def get(self, path: str, interface: str, name: str) -> Any:
        (value,) = await self.call("Get", "ss", interface, name, path=path, interface=PROPERTIES)
        return plain(value)

    async def all(self, path: str, interface: str) -> dict[str, Any]:
        (values,) = await self.call("GetAll", "s", interface, path=path, interface=PROPERTIES)
        return plain(values)

    async def objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        (objects,) = await self.call("GetManagedObjects", interface=OBJECT_MANAGER)
        return plain(objects)

    async def finished(self, job: str) -> dict[str, Any]:
        """The job's properties when it has ended."""
        await eventually(lambda: self._has_finished(job))
        return await self.all(job, wire.JOB)

    async def _has_finished(self, job: str) -> bool:
        return await self.get(job, wire.JOB, "State") in {"done", "failed", "cancelled"}

    async def model(self, name: str) -> dict[str, Any]:
        """A model's properties, once it is there."""
        path = wire.model_path(name)

        async def is_there() -> bool:
            return path in await self.objects()

        await eventually(is_there)
        return await self.all(path, wire.MODEL)

    async def settle(self, *names: str) -> None:
        """Brings a daemon of several tests back to where each begins: these models, all public, and no engine."""
        objects = await self.objects()
        for path, found in objects.items():
            if wire.ENGINE in found:
                await self.call("Stop", path=path, interface=wire.ENGINE)
        for path, found in objects.items():
            if wire.MODEL in found and found[wire.MODEL]["Name"] not in names:
                await self.call("Remove", path=path, interface=wire.MODEL)
            elif wire.MODEL in found and found[wire.MODEL]["Private"]:
                await self.call("SetPrivate", "b", False, path=path, interface=wire.MODEL)

    async def import_folder(self, folder: Path, name: str, **options: Variant) -> str:
        """Sends the files of a folder, as many messages as it takes; returns the job."""
        batches = _batches(folder)
        job = ""
        for number, batch in enumerate(batches):
            more = number < len(batches) - 1
            fds = [os.open(file, os.O_RDONLY) for file in batch]
            indexes = {file.name: index for index, file in enumerate(batch)}
            try:
                if not job:
                    (job,) = await self.call("Import", "sa{sh}ba{sv}", name, indexes, more, options, fds=fds)
                else:
                    await self.call("ImportFiles", "oa{sh}b", job, indexes, more, fds=fds)
            finally:
                for fd in fds:
                    os.close(fd)
        return job


def _batches(folder: Path) -> list[list[Path]]:
    files = sorted(folder.iterdir())
    return [files[i : i + wire.FILES_PER_MESSAGE] for i in range(0, len(files), wire.FILES_PER_MESSAGE)]


@asynccontextmanager
async def remote_of(daemon: Daemon) -> AsyncIterator[Remote]:
    connection = await connect(daemon.address)
    made = Remote(connection)
    connection.listen(made.signals.append)
    await connection.add_match(f"type='signal',sender='{wire.BUS_NAME}'")
    yield made
    await connection.close()


@pytest.fixture
async def remote(daemon: Daemon) -> AsyncIterator[Remote]:
    async with remote_of(daemon) as made:
        yield made


@pytest.fixture(scope="module")
def shared(sources: Path) -> Iterator[Daemon]:
    """A daemon with ada, bob and carl for the tests of a module that leave it as it was."""
    with lasting_daemon(*(sources / name for name in ("ada", "bob", "carl"))) as running:
        yield running


@pytest.fixture
async def lasting(shared: Daemon) -> AsyncIterator[Remote]:
    async with remote_of(shared) as made:
        yield made
        await made.settle("ada", "bob", "carl")


def make_source(
    folder: Path, *, seed: int = 0, shards: int = 1, elements: int = 3000, config: Mapping[str, Any] | None = None
) -> Path:
    """A source folder of random weights; other seeds make other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    weight_map = {}
    for shard in range(1, shards + 1):
        name = "model.safetensors" if shards == 1 else f"model-{shard:05d}-of-{shards:05d}.safetensors"
        tensors = {f"layer.{shard}.weight": random.standard_normal(elements, dtype=np.float32)}
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    architecture = {"architectures": ["TinyForNothing"], "model_type": "tiny"}
    (folder / "config.json").write_text(json.dumps(config or architecture))
    return folder


async def import_model(remote: Remote, folder: Path, name: str) -> None:
    job = await remote.finished(await remote.import_folder(folder, name))
    assert job["State"] == "done", job
