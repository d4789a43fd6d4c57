# SPDX-License-Identifier: Apache-2.0
"""How do programs ask the daemon? A blocking client over D-Bus; the bus runs on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import queue
import socket
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from dbus_next import Variant

from flashd import bus, config, wire
from flashd.bus import OBJECT_MANAGER, PROPERTIES, Connection, Received, plain
from flashd.checkpoint import header
from flashd.checkpoint.source import SourceFiles
from flashd.errors import FlashdError, InvalidArgument, Unavailable, from_bus
from flashd.hub import PullOutcome

if TYPE_CHECKING:
    import torch

    from flashd import inference

T = TypeVar("T")
Properties = Mapping[str, Any]
OnProgress = Callable[["Job"], None]

_CALL_S = 25.0
_PERSON_S = 300.0  # somebody may be asked for a password meanwhile
_START_S = 60.0  # for a service manager, and a daemon with a thousand models
_LEASE_S = 3600.0  # a lease loads the model first, from whatever disk there is
_MATCH = f"type='signal',sender='{wire.BUS_NAME}',path_namespace='{wire.ROOT_PATH}'"
_GONE = f"type='signal',sender='{bus.DBUS}',member='NameOwnerChanged',arg0='{wire.BUS_NAME}'"


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it was when asked. Sizes in bytes, times in seconds since the epoch (0 for never)."""

    name: str
    aliases: tuple[str, ...]
    checkpoint: str
    architecture: str
    dtype: str
    size_bytes: int
    tensor_count: int
    residency: str
    devices: tuple[str, ...]
    active: bool
    pinned: bool
    leases: int
    created_at: int
    last_used_at: int
    use_count: int
    source: str
    path: str
    owner_uid: int = 0
    private: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """An inference process as it was when asked."""

    kind: str
    state: str
    model: str
    architecture: str
    endpoint: str
    pid: int
    active_requests: int
    memory_bytes: int
    device_bytes: int
    weights: str
    started_at: int
    path: str


@dataclass(frozen=True, slots=True)
class Device:
    """A memory and its pool as they were when asked."""

    name: str
    kind: str
    model: str
    uuid: str
    total_bytes: int
    budget_bytes: int
    used_bytes: int
    leased_bytes: int
    driver_used_bytes: int
    huge_pages: str
    integrated: bool
    reads_host_pages: bool
    maps_memory: bool
    exports_memory: bool
    path: str


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python environment that engines can run in; `current` if new ones do, `fits` if they could."""

    kind: str
    number: int
    version: str
    current: bool
    fits: bool
    size_bytes: int
    created_at: int


@dataclass(frozen=True, slots=True)
class InboxItem:
    """A source that is not a model yet; state is settling, incomplete, converting or failed."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True, slots=True)
class Status:
    """The machine as it was when asked. `active_model` is a name, empty if none is."""

    version: str
    state: str
    active_model: str
    endpoint: str
    models_directories: tuple[str, ...]
    store_path: str
    store_bytes: int
    store_quota_bytes: int
    store_free_bytes: int
    inbox_items: tuple[InboxItem, ...]


@dataclass(frozen=True, slots=True)
class SwapOutcome:
    """How a swap went: `how` is already-active, rebind, wake or start; `from_tier` is where the weights were."""

    model: str
    how: str
    from_tier: str
    seconds: float
    endpoint: str

    @classmethod
    def from_result(cls, result: Properties) -> SwapOutcome:
        """From the result of a swap's job."""
        name = _name_of(result["model"])
        return cls(name, result["how"], result["from_tier"], result["seconds"], result["endpoint"])


@dataclass(frozen=True, slots=True)
class Event:
    """Something changed: an object appeared (`added`), changed or went (`removed`), or a signal was sent."""

    kind: str
    path: str
    interface: str
    properties: Properties


class Job:
    """A long operation in the daemon; its attributes are as of the last `refresh`, `wait` or progress report."""

    def __init__(self, client: Client, path: str, properties: Properties) -> None:
        self._client = client
        self.path = path
        self._read(properties)

    @property
    def finished(self) -> bool:
        return self.state in {"done", "failed", "cancelled"}

    def refresh(self) -> None:
        self._read(self._client._properties(self.path, wire.JOB))

    def cancel(self) -> None:
        self._client._call(self.path, wire.JOB, "Cancel")

    def wait(self, on_progress: OnProgress | None = None) -> Mapping[str, Any]:
        """Its result, once it is done. Raises what made it fail. Interrupting the wait leaves the job running."""
        with self._client.subscribed() as events:
            self.refresh()
            return self._follow(events, on_progress)

    def _follow(self, events: queue.SimpleQueue[Event | None], on_progress: OnProgress | None) -> Mapping[str, Any]:
        """Like `wait`, with the events since before it was read."""
        while not self.finished:
            if on_progress:
                on_progress(self)
            event = events.get()
            if event is None:
                raise Unavailable("flashd ended during the job", hint="start it again: flash start")
            if event.path == self.path:
                self._note(event)
        if on_progress:
            on_progress(self)
        if self.error_name:
            raise from_bus(self.error_name, self.error_message, self.error_hint)
        return self.result

    def _note(self, event: Event) -> None:
        """What changed comes with the event: at the end of a swap of milliseconds, asking again would show."""
        if event.kind in {"added", "changed"}:
            self._read({**self._properties, **event.properties})
        else:
            self.refresh()

    def _read(self, properties: Properties) -> None:
        self._properties = properties
        self.number = int(self.path.rsplit("/", 1)[-1])
        self.kind: str = properties["Kind"]
        self.subject: str = properties["Subject"]
        self.state: str = properties["State"]
        self.phase: str = properties["Phase"]
        self.done_bytes: int = properties["DoneBytes"]
        self.total_bytes: int = properties["TotalBytes"]
        self.created_at: float = properties["CreatedAt"]
        self.finished_at: float = properties["FinishedAt"]
        self.result: Mapping[str, Any] = properties["Result"]
        name, message, hint = properties["Error"]
        self.error_name: str = name
        self.error_message: str = message.removesuffix("\n" + hint) if hint else message
        self.error_hint: str = hint


class Lease:
    """The right to use a model's weights in place; ends with `release`, its context, or this process."""

    def __init__(self, client: Client, path: str, fd: int, layout: header.Header, details: Properties) -> None:
        self._client = client
        self._path = path
        self._fd = fd
        self.layout = layout
        self.model: str = details["model"]
        self.checkpoint: str = details["checkpoint"]
        self.size_bytes: int = details["size_bytes"]
        self.mapped_bytes: int = details["mapped_bytes"]
        self.device: str = details["device"]
        self.memory: str = details["memory"]
        self._gpu_uuid: str = details["gpu"]
        self._region: memoryview | None = None
        self._base: torch.Tensor | None = None

    @property
    def fd(self) -> int:
        """The arena; it stays the lease's. A sealed memfd that can only be mapped for reading if `memory` is host, a
        GPU's allocation if it is cuda."""
        return self._fd

    @property
    def buffer(self) -> memoryview:
        """All weights, mapped for reading; tensor extents of `layout` count from its start.

        Raises InvalidArgument for memory of a GPU, which the processor cannot read.
        """
        if self.memory != "host":
            raise InvalidArgument(f"the lease is on {self.device}", hint='use tensors(), or lease it on "host"')
        if self._region is None:
            mapping = mmap.mmap(self._fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
            self._region = memoryview(mapping)[: self.size_bytes]
        return self._region

    def tensors(self) -> dict[str, torch.Tensor]:
        """torch tensors over the arena, on its device, nothing copied, for reading. They keep the memory mapped.

        Needs torch, and for a GPU cuda-python. Raises DeviceFailed if this process cannot use that GPU.
        """
        from flashd import tensors

        return tensors.torch_tensors(self.bytes_tensor(), self.layout)

    def bytes_tensor(self) -> torch.Tensor:
        """All weights as one torch tensor of bytes; raises as `tensors` does."""
        from flashd import tensors

        if self._base is None:
            self._base = (
                tensors.mapped(
                    self._fd, self.size_bytes, self.mapped_bytes, memory=self.memory, gpu_uuid=self._gpu_uuid
                )
                if self._gpu_uuid
                else tensors.bytes_tensor(self.buffer)
            )
        return self._base

    def release(self) -> None:
        """Gives the right back. Memory stays mapped while tensors over it are alive, but no longer counts as leased."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._region = self._base = None
            with contextlib.suppress(Unavailable):  # the daemon has gone, and the lease with it
                self._client._call(self._path, wire.LEASE, "Release")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Client:
    """A connection to one daemon. Methods block; use one client a thread. Make it with `connect`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, thread: threading.Thread, connection: Connection, interactive: bool
    ) -> None:
        self._interactive = interactive
        self._loop = loop
        self._thread = thread
        self._connection = connection
        self._subscribers: list[queue.SimpleQueue[Event | None]] = []
        self._matched = False
        self._last_layout: tuple[str, header.Header] | None = None
        connection.listen(self._on_signal)

    # -- models ------------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """All models, by name."""
        (listed,) = self._manager("ListModels")
        return [_model(path, found) for path, found in json.loads(listed).items()]

    def model(self, name: str) -> Model:
        """The model that `name` means; raises NotFound."""
        path = self._find(name)
        return _model(path, self._properties(path, wire.MODEL))

    def import_(
        self,
        path: Path,
        name: str,
        *,
        aliases: Sequence[str] = (),
        replace: bool = True,
        private: bool | None = None,
        on_progress: OnProgress | None = None,
    ) -> Model:
        """Makes a model of a folder or file that this process can read.

        Without `private` it is what the model was that it replaces, else for all to see.
        """
        job = self.begin_import(path, name, aliases=aliases, replace=replace, private=private)
        return self.model(_name_of(job.wait(on_progress)["model"]))

    def begin_import(
        self, path: Path, name: str, *, aliases: Sequence[str] = (), replace: bool = True, private: bool | None = None
    ) -> Job:
        """Like `import_`, without waiting. The files are opened here and handed over: the daemon opens none itself."""
        options = {"aliases": Variant("as", list(aliases)), "replace": Variant("b", replace)}
        if private is not None:
            options["private"] = Variant("b", private)
        with SourceFiles.from_path(Path(path).resolve()) as files:
            job_path = ""
            for table, fds, more in _batches({file: files[file].fd for file in files}):
                if not job_path:
                    (job_path,) = self._manager("Import", "sa{sh}ba{sv}", name, table, more, options, fds=fds)
                else:
                    self._manager("ImportFiles", "oa{sh}b", job_path, table, more, fds=fds)
        return self._job(job_path)

    def pull(
        self,
        repository: str,
        *,
        revision: str = "main",
        name: str = "",
        aliases: Sequence[str] = (),
        token: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> PullOutcome:
        """Downloads a model from the Hugging Face Hub, in this process, and hands it over while it arrives.

        `name` is by default the repository's. A commit that is there already is not downloaded again; another one
        becomes a new version. Also after a failure, what has arrived is not downloaded again.

        `token` is by default the one that huggingface_hub finds (HF_TOKEN, hf auth login); it stays in this process.
        Raises NotFound, NotAuthorized (private and gated repositories), Unavailable, StoreFull, TransferFailed,
        InvalidSource, or Busy while this user pulls it already.
        """
        from flashd.hub.pull import pull  # and huggingface_hub with it, which few programs need

        return pull(
            self,
            repository,
            revision=revision,
            name=name,
            aliases=aliases,
            token=token,
            on_progress=on_progress,
        )

    def run_errand(self, job_path: str) -> None:
        """Downloads what another program of this user's asked for by the bus method Pull."""
        from flashd.hub.pull import pull

        job = self._job(job_path)
        repository, revision, name = self._manager("ClaimPull", "o", job_path)
        pull(self, repository, revision=revision, name=name, job=job)

    def begin_pull(self, origin: str, name: str, *, aliases: Sequence[str] = (), job: Job | None = None) -> Job:
        """A job for a model that this process downloads from somewhere, or what is known now of one that it claimed:
        `feed_pull` it. `pull` does all of that. Nothing is to be done if it has finished at once."""
        options = {"job": Variant("o", job.path)} if job else {"aliases": Variant("as", list(aliases))}
        (path,) = self._manager("BeginPull", "ssa{sv}", origin, name, options)
        return self._job(path)

    def feed_pull(self, job: Job, files: Mapping[str, int], *, awaited: Collection[str] = ()) -> None:
        """The first call announces all files, as descriptors, those that are awaited by stand-ins; later ones hand over
        what has arrived. See PullFiles of org.flashd1.Manager."""
        names = list(files)
        batches = [names[i : i + wire.FILES_PER_MESSAGE] for i in range(0, len(names), wire.FILES_PER_MESSAGE)]
        for batch in batches:
            table = {file: number for number, file in enumerate(batch)}
            late = [file for file in batch if file in awaited]
            fds = [files[file] for file in batch]
            self._manager("PullFiles", "oa{sh}asb", job.path, table, late, batch is not batches[-1], fds=fds)

    def tell_pull(self, job: Job, done_bytes: int, total_bytes: int) -> None:
        """How far the download is."""
        self._manager("PullProgress", "ott", job.path, done_bytes, total_bytes)

    def fail_pull(self, job: Job, error: FlashdError) -> None:
        """Why the download cannot go on; the job fails with that."""
        self._manager("PullFailed", "osss", job.path, error.bus_name(), error.message, error.hint)

    def remove(self, name: str) -> None:
        """Forgets the model; raises Busy while it is active."""
        self._call(self._find(name), wire.MODEL, "Remove")

    def pin(self, name: str) -> None:
        self._call(self._find(name), wire.MODEL, "Pin")

    def unpin(self, name: str) -> None:
        self._call(self._find(name), wire.MODEL, "Unpin")

    def evict(self, name: str) -> None:
        """Leaves all memory; raises Busy while leased or active."""
        self._call(self._find(name), wire.MODEL, "Evict")

    def set_aliases(self, name: str, aliases: Sequence[str]) -> None:
        self._call(self._find(name), wire.MODEL, "SetAliases", "as", list(aliases))

    def set_private(self, name: str, private: bool) -> None:
        """Whether the model exists for its owner and root only; raises Busy while it is active."""
        self._call(self._find(name), wire.MODEL, "SetPrivate", "b", private)

    def verify(self, name: str, on_progress: OnProgress | None = None) -> None:
        """Compares the checkpoint with its digests; raises CorruptCheckpoint."""
        (path,) = self._call(self._find(name), wire.MODEL, "Verify")
        self._job(path).wait(on_progress)

    # -- swapping ----------------------------------------------------------------------------------------------------

    def swap(self, name: str, on_progress: OnProgress | None = None, *, engine: str = "") -> SwapOutcome:
        """Makes a model the active one; returns when its first token is possible. On failure the old one goes on.

        `engine` is torch or vllm; by default what is configured, or the one that has the model already.
        """
        with self.subscribed() as events:  # before, so that the job need be read only once
            return SwapOutcome.from_result(self.begin_swap(name, engine=engine)._follow(events, on_progress))

    def begin_swap(self, name: str, *, engine: str = "") -> Job:
        """Like `swap`, without waiting."""
        options = {"engine": Variant("s", engine)} if engine else {}
        (path,) = self._manager("Swap", "sa{sv}", name, options)
        return self._job(path)

    def load(
        self, name: str, tier: str = "host", on_progress: OnProgress | None = None, *, device: str = ""
    ) -> Mapping[str, Any]:
        """Brings a model into a memory tier: host, or device, of which `device` names one if there are several."""
        options = {"device": Variant("s", device)} if device else {}
        (path,) = self._manager("Load", "ssa{sv}", name, tier, options)
        return self._job(path).wait(on_progress)

    def park(self) -> None:
        """Parks the active engine: no model is active then."""
        (path,) = self._manager("Park")
        self._job(path).wait()

    def lease(self, name: str, device: str = "host") -> Lease:
        """The weights themselves, in place, on "host" or a device such as "cuda:0". Blocks until they are there."""
        return self._lease("Lease", "sa{sv}", name, {"device": Variant("s", device)})

    def lease_image(self, name: str, build: str, device: str) -> Lease:
        """An image of a model that another engine of this user has published for this build (see `publish_image`), on
        a GPU such as "cuda:0". Raises NotFound if there is none."""
        return self._lease("LeaseImage", "sssa{sv}", name, build, device, {})

    def publish_image(self, name: str, build: str, device: str, fd: int, layout: str, size_bytes: int) -> None:
        """Hands over what an engine has made of a model in memory of a GPU, so that other engines of this user share
        it; the descriptor stays the caller's. The daemon keeps it as long as this client lives, and as long as there
        is room. Raises OutOfMemory or AlreadyExists.

        `build` is a digest of all that it depends on besides the checkpoint.
        """
        self._manager("PublishImage", "ssshsta{sv}", name, build, device, 0, layout, size_bytes, {}, fds=(fd,))

    def _lease(self, member: str, signature: str, name: str, *more: Any) -> Lease:
        reply = self._run(
            self._connection.call(
                *(wire.BUS_NAME, wire.ROOT_PATH, wire.MANAGER, member, signature, (name, *more)),
                timeout_s=_LEASE_S,
                interactive=self._interactive,
            )
        )
        path, fd, layout, details = reply.body
        details = plain(details)
        # Leased again and again, as by engines that wake, a checkpoint's layout is understood once.
        if self._last_layout is None or self._last_layout[0] != layout:
            parsed = header.parse(layout.encode(), data_bytes=details["size_bytes"], path=name)
            self._last_layout = layout, parsed
        return Lease(self, path, fd, self._last_layout[1], details)

    def chat(self, name: str, messages: Sequence[inference.Message], **parameters: Any) -> str:
        """Asks the active model, which must be `name`; swap to it first."""
        from flashd import inference  # and httpx with it, which programs that only watch need not carry

        return inference.chat(self.endpoint(), name, messages, **parameters)

    def stream_chat(self, name: str, messages: Sequence[inference.Message], **parameters: Any) -> Iterator[str]:
        """Like `chat`, as the answer grows."""
        from flashd import inference

        return inference.stream_chat(self.endpoint(), name, messages, **parameters)

    def endpoint(self) -> inference.Endpoint:
        """Where the active model answers, for `flashd.inference`: the path of a socket, or, for who may not connect
        there but may use models, a function that makes a connection to it."""
        path = self.status().endpoint
        return path if os.access(path, os.W_OK) else self.open_endpoint

    def open_endpoint(self) -> socket.socket:
        """A connection to the active model, made by the daemon. Raises Unavailable if none is, or NotAuthorized."""
        (fd,) = self._manager("OpenEndpoint")
        return socket.socket(fileno=fd)

    # -- the machine -------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        found = self._properties(wire.ROOT_PATH, wire.MANAGER)
        return Status(
            version=found["Version"],
            state=found["State"],
            active_model=_name_of(found["ActiveModel"]),
            endpoint=found["Endpoint"],
            models_directories=tuple(found["ModelsDirectories"]),
            store_path=found["StorePath"],
            store_bytes=found["StoreBytes"],
            store_quota_bytes=found["StoreQuotaBytes"],
            store_free_bytes=found["StoreFreeBytes"],
            inbox_items=tuple(InboxItem(*item) for item in found["InboxItems"]),
        )

    def engines(self) -> list[Engine]:
        return self._objects(wire.ENGINE, _engine)

    def stop_engine(self, engine: Engine) -> None:
        """Ends its process; whatever it answers is cut short."""
        self._call(engine.path, wire.ENGINE, "Stop")

    def environments(self) -> list[Environment]:
        """The Python environments that were installed for engines, by kind, the newest last."""
        return [Environment(*found) for found in self._manager("ListEnvironments")[0]]

    def begin_install(self, kind: str, wheels: Sequence[Path]) -> Job:
        """Makes an environment for engines of a kind of exactly these wheels, which are opened here and handed over."""
        with contextlib.ExitStack() as stack:
            fds = {wheel.name: stack.enter_context(wheel.open("rb")).fileno() for wheel in wheels}
            job_path = ""
            for table, batch, more in _batches(fds):
                if not job_path:
                    (job_path,) = self._manager("InstallEnvironment", "sa{sh}b", kind, table, more, fds=batch)
                else:
                    self._manager("AddWheels", "oa{sh}b", job_path, table, more, fds=batch)
        return self._job(job_path)

    def use_environment(self, kind: str, number: int) -> None:
        """Has new engines of a kind run in another environment; 0 for none but flashd's own."""
        self._manager("UseEnvironment", "su", kind, number)

    def remove_environment(self, kind: str, number: int) -> None:
        """Raises Busy while engines run, or would run, in it."""
        self._manager("RemoveEnvironment", "su", kind, number)

    def devices(self) -> list[Device]:
        return self._objects(wire.DEVICE, _device)

    def jobs(self) -> list[Job]:
        """All jobs, the finished ones of the last minutes included, oldest first."""
        jobs = self._objects(wire.JOB, lambda path, properties: Job(self, path, properties))
        return sorted(jobs, key=lambda job: job.number)

    def job(self, number: int) -> Job:
        """Raises NotFound if it is long over."""
        return self._job(wire.job_path(number))

    def scrub(self, on_progress: OnProgress | None = None) -> Mapping[str, Any]:
        """Compares everything in the store with its digests: {checked, corrupt, size_bytes}."""
        (path,) = self._manager("Scrub")
        return self._job(path).wait(on_progress)

    def collect(self) -> tuple[list[str], int]:
        """Deletes what nobody needs; the checkpoints deleted, and the bytes freed."""
        removed, freed_bytes = self._manager("Collect")
        return removed, freed_bytes

    def config(self) -> str:
        """The configuration in force, as TOML."""
        return str(self._manager("GetConfig")[0])

    def set_config(self, key: str, value: str) -> bool:
        """Changes a setting; True if the daemon must be restarted for it."""
        return bool(self._manager("SetConfig", "ss", key, value)[0])

    def stop(self) -> None:
        """Ends the daemon."""
        self._manager("Stop")

    def watch(self) -> Iterator[Event]:
        """Every change, as it happens, until the daemon ends."""
        with self.subscribed() as events:
            while (event := events.get()) is not None:
                yield event

    @contextlib.contextmanager
    def subscribed(self) -> Iterator[queue.SimpleQueue[Event | None]]:
        """Like `watch`, for who waits for other things too: a queue of all changes from now on, None at the end."""
        if not self._matched:
            self._run(self._connection.add_match(_MATCH))
            self._run(self._connection.add_match(_GONE))
            self._matched = True
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._subscribers.append(events)
        gone = self._run(_when_closed(self._connection, lambda: events.put(None)))
        try:
            yield events
        finally:
            self._subscribers.remove(events)
            self._loop.call_soon_threadsafe(gone.cancel)

    def close(self) -> None:
        if self._thread.is_alive():
            self._run(self._connection.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- the bus -----------------------------------------------------------------------------------------------------

    def _run(self, step: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(step, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _call(
        self, path: str, interface: str, member: str, signature: str = "", *body: Any, fds: Sequence[int] = ()
    ) -> Any:
        asks = self._interactive and interface in wire.INTERFACES  # nobody is asked about reading properties
        reply = self._run(
            self._connection.call(
                *(wire.BUS_NAME, path, interface, member, signature, body),
                fds=fds,
                timeout_s=_PERSON_S if asks else _CALL_S,
                interactive=asks,
            )
        )
        return tuple(plain(value) for value in reply.body)

    def _manager(self, member: str, signature: str = "", *body: Any, fds: Sequence[int] = ()) -> Any:
        return self._call(wire.ROOT_PATH, wire.MANAGER, member, signature, *body, fds=fds)

    def _find(self, name: str) -> str:
        return str(self._manager("FindModel", "s", name)[0])

    def _properties(self, path: str, interface: str) -> Properties:
        found: Properties = self._call(path, PROPERTIES, "GetAll", "s", interface)[0]
        return found

    def _job(self, path: str) -> Job:
        return Job(self, path, self._properties(path, wire.JOB))

    def _objects(self, interface: str, make: Callable[[str, Properties], T]) -> list[T]:
        (objects,) = self._call(wire.ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects")
        return [make(path, found[interface]) for path, found in objects.items() if interface in found]

    def _on_signal(self, signal: Received) -> None:
        match signal.interface, signal.member:
            case bus.DBUS, "NameOwnerChanged":
                if signal.body[0] == wire.BUS_NAME and not signal.body[2]:
                    self._publish(None)
            case str(i), "PropertiesChanged" if i == PROPERTIES:
                self._publish(Event("changed", signal.path, signal.body[0], plain(signal.body[1])))
            case str(i), "InterfacesAdded" if i == OBJECT_MANAGER:
                for interface in set(signal.body[1]) & set(wire.INTERFACES):
                    self._publish(Event("added", signal.body[0], interface, plain(signal.body[1][interface])))
            case str(i), "InterfacesRemoved" if i == OBJECT_MANAGER:
                for interface in set(signal.body[1]) & set(wire.INTERFACES):
                    self._publish(Event("removed", signal.body[0], interface, {}))
            case str(i), "Finished" if i == wire.JOB:
                self._publish(Event("finished", signal.path, i, {"State": signal.body[0]}))

    def _publish(self, event: Event | None) -> None:
        for events in list(self._subscribers):
            events.put(event)


def _batches(fds: Mapping[str, int]) -> Iterator[tuple[dict[str, int], list[int], bool]]:
    """Descriptors by name in messages as large as a bus takes: (name to index, descriptors, whether more follow)."""
    names = list(fds)
    for start in range(0, max(len(names), 1), wire.FILES_PER_MESSAGE):
        batch = names[start : start + wire.FILES_PER_MESSAGE]
        more = start + wire.FILES_PER_MESSAGE < len(names)
        yield {name: index for index, name in enumerate(batch)}, [fds[name] for name in batch], more


async def _when_closed(connection: Connection, then: Callable[[], None]) -> asyncio.Task[None]:
    async def watch() -> None:
        await connection.closed()
        then()

    return asyncio.create_task(watch())


def connect(address: str | None = None, *, interactive: bool = True, activate: bool = True) -> Client:
    """See `flashd.connect`. Without `interactive` nobody is asked for a password: a call is then refused at once.
    Without `activate` a daemon that was stopped stays so."""
    wanted = address or config.bus_address()
    if wanted:
        return _connected(wanted, interactive, activate)
    private = config.default_paths(config.Scope.USER).runtime / "bus"
    places = [f"unix:path={private}"] if private.exists() else []
    places += ["session"] if config.has_session_bus() else []
    for place in (*places, "system"):
        with contextlib.suppress(FlashdError):
            return _connected(place, interactive, activate)
    raise Unavailable("flashd is not running", hint="start it: flash start")


def _connected(address: str, interactive: bool, activate: bool) -> Client:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="flashd client", daemon=True)
    thread.start()
    try:
        connection = asyncio.run_coroutine_threadsafe(_connect(address, activate), loop).result()
    except BaseException:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        raise
    return Client(loop, thread, connection, interactive)


async def _connect(address: str, activate: bool) -> Connection:
    connection = await bus.connect(address)
    reply = await connection.call(bus.DBUS, bus.DBUS_PATH, bus.DBUS, "NameHasOwner", "s", [wire.BUS_NAME])
    if not reply.body[0] and not (activate and await _activated(connection)):
        await connection.close()
        raise Unavailable(f"flashd is not running on the bus {address}", hint="start it: flash start")
    return connection


async def _activated(connection: Connection) -> bool:
    """Where the bus can start the daemon, as the machine's own can, connecting does; nothing later does."""
    reply = await connection.call(bus.DBUS, bus.DBUS_PATH, bus.DBUS, "ListActivatableNames")
    if wire.BUS_NAME not in reply.body[0]:
        return False
    with contextlib.suppress(FlashdError):
        await connection.call(
            bus.DBUS, bus.DBUS_PATH, bus.DBUS, "StartServiceByName", "su", [wire.BUS_NAME, 0], timeout_s=_START_S
        )
        return True
    return False


def _name_of(path: str) -> str:
    """The name in a model's path; empty for none."""
    return wire.unescape(path.rsplit("/", 1)[-1]) if path != "/" else ""


def _model(path: str, found: Properties) -> Model:
    return Model(
        name=found["Name"],
        aliases=tuple(found["Aliases"]),
        checkpoint=found["Checkpoint"],
        architecture=found["Architecture"],
        dtype=found["DType"],
        size_bytes=found["SizeBytes"],
        tensor_count=found["TensorCount"],
        residency=found["Residency"],
        devices=tuple(found["Devices"]),
        active=found["Active"],
        pinned=found["Pinned"],
        leases=found["Leases"],
        created_at=found["CreatedAt"],
        last_used_at=found["LastUsedAt"],
        use_count=found["UseCount"],
        source=found["Source"],
        owner_uid=found.get("OwnerUid", 0),
        private=found.get("Private", False),
        path=path,
    )


def _engine(path: str, found: Properties) -> Engine:
    return Engine(
        kind=found["Kind"],
        state=found["State"],
        model=_name_of(found["Model"]),
        architecture=found["Architecture"],
        endpoint=found["Endpoint"],
        pid=found["Pid"],
        active_requests=found["ActiveRequests"],
        memory_bytes=found["MemoryBytes"],
        device_bytes=found.get("DeviceBytes", 0),
        weights=found.get("Weights", ""),
        started_at=found["StartedAt"],
        path=path,
    )


def _device(path: str, found: Properties) -> Device:
    return Device(
        name=found["Name"],
        kind=found["Kind"],
        model=found["Model"],
        uuid=found["Uuid"],
        total_bytes=found["TotalBytes"],
        budget_bytes=found["BudgetBytes"],
        used_bytes=found["UsedBytes"],
        leased_bytes=found["LeasedBytes"],
        driver_used_bytes=found["DriverUsedBytes"],
        huge_pages=found["HugePages"],
        integrated=found["Integrated"],
        reads_host_pages=found["ReadsHostPages"],
        maps_memory=found["MapsMemory"],
        exports_memory=found["ExportsMemory"],
        path=path,
    )
