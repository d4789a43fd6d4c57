# SPDX-License-Identifier: Apache-2.0
"""The blocking client of the daemon, over D-Bus.

Every `flash` command and every program that uses flashd imports this module, so modules that only some methods need are
imported in those methods.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from flashd.client.results import (
    Device,
    Engine,
    Environment,
    Event,
    Model,
    Properties,
    Status,
    SwapOutcome,
    device_from,
    engine_from,
    model_from,
    name_of,
    status_from,
)
from flashd.closing import Closing
from flashd.config.environment import given_bus_address, has_session_bus
from flashd.config.paths import Scope, default_paths
from flashd.dbus import address as bus_address
from flashd.dbus import blocking, wire
from flashd.dbus.blocking import BlockingConnection, Signal
from flashd.dbus.values import Variant
from flashd.dbus.wire import OBJECT_MANAGER, PROPERTIES
from flashd.errors import Busy, FlashdError, InvalidArgument, NotFound, Unavailable, from_bus

if TYPE_CHECKING:
    import torch

    from flashd.checkpoint import header
    from flashd.client import openai
    from flashd.hub import PullOutcome

T = TypeVar("T")
OnProgress = Callable[["Job"], None]

_CALL_S = 25.0
_MOST_ATTEMPTS = 3  # to ask a model that others keep displacing
_MOST_TEXT = 1000  # characters of a message or hint of PullFailed; the rest is cut off
_PERSON_S = 300.0  # polkit may ask a person for a password meanwhile
_START_S = 60.0  # the service manager starts a daemon, perhaps with a thousand models
_LEASE_S = 3600.0  # a lease first loads the model, perhaps from a slow disk
_MATCH = f"type='signal',sender='{wire.BUS_NAME}',path_namespace='{wire.ROOT_PATH}'"
_GONE = f"type='signal',sender='{wire.DBUS}',member='NameOwnerChanged',arg0='{wire.BUS_NAME}'"


class Job:
    """A long operation in the daemon. Attributes are as of the last `refresh`, `wait` or progress report.

    `state` is collecting, queued, running, done, failed or cancelled. `total_bytes` is 0 while it is unknown. Times are
    in seconds since the epoch; `finished_at` is 0 before the end.
    """

    def __init__(self, client: Client, path: str, properties: Properties) -> None:
        self._client = client
        self.path = path
        self._read(properties)

    @property
    def finished(self) -> bool:
        """True if the job is done, failed or cancelled."""
        return self.state in {"done", "failed", "cancelled"}

    def refresh(self) -> None:
        """Reads the attributes from the daemon. Raises NotFound some minutes after the job's end."""
        self._read(self._client._properties(self.path, wire.JOB))

    def cancel(self) -> None:
        """Withdraws this client's request for the job.

        The job ends if no other client has asked for it; after `refresh`, `askers` is the number of those that have.
        """
        self._client._call(self.path, wire.JOB, "Cancel")

    def wait(self, on_progress: OnProgress | None = None) -> Mapping[str, Any]:
        """Waits for the end of the job and returns its result. Interrupting the wait leaves the job running.

        `on_progress` is called with the job at first and after each change. Raises the error with which the job failed,
        Cancelled, or Unavailable if the daemon ends.
        """
        with self._client.subscribed() as events:
            self.refresh()
            return self.follow(events, on_progress)

    def follow(
        self, events: queue.SimpleQueue[Event | None], on_progress: OnProgress | None = None
    ) -> Mapping[str, Any]:
        """Waits like `wait`, without another call: `events`, of `Client.subscribed`, begins before the job did."""
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
        """Takes the changed attributes from the event. A call would add notable time to a swap of milliseconds."""
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
        self.askers: int = properties.get("Askers", 0)  # daemons before 2026-12 lack the property
        self.result: Mapping[str, Any] = properties["Result"]
        name, message, hint = properties["Error"]
        self.error_name: str = name
        self.error_message: str = message.removesuffix("\n" + hint) if hint else message
        self.error_hint: str = hint


class Lease:
    """The right to use a model's weights in place, until `release`, the end of its context, or of this process.

    `layout` is the parsed safetensors header of the checkpoint. `size_bytes` is the size of the weights, `mapped_bytes`
    that of the whole allocation. `device` is "host" or a GPU such as "cuda:0"; `memory` is "host" or "cuda".
    """

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
        """Descriptor of the arena, which the lease closes; -1 after `release`.

        It is a sealed memfd, which can only be mapped for reading, if `memory` is "host", and an exported GPU
        allocation if it is "cuda".
        """
        return self._fd

    @property
    def buffer(self) -> memoryview:
        """All weights, mapped for reading. The extents of tensors in `layout` count from its start.

        Raises InvalidArgument for GPU memory, which the CPU cannot read.
        """
        if self.memory != "host":
            raise InvalidArgument(f"the lease is on {self.device}", hint='use tensors(), or lease it on "host"')
        if self._region is None:
            import mmap

            mapping = mmap.mmap(self._fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
            self._region = memoryview(mapping)[: self.size_bytes]
        return self._region

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns read-only torch tensors by name, on the arena's device and without a copy. They keep it mapped.

        Needs torch and, for a GPU, cuda-python. Raises DeviceFailed if this process cannot use that GPU, and
        Unsupported for dtypes that torch lacks.
        """
        from flashd import tensors

        return tensors.torch_tensors(self.bytes_tensor(), self.layout)

    def bytes_tensor(self) -> torch.Tensor:
        """Returns all weights as one read-only torch tensor of bytes, shape (size_bytes,), dtype uint8.

        Raises DeviceFailed like `tensors`.
        """
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
        """Ends the lease. The arena stays mapped while tensors over it are alive, but no longer counts as leased."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._region = self._base = None
            with contextlib.suppress(Unavailable):  # the daemon has ended, and the lease with it
                self._client._call(self._path, wire.LEASE, "Release")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Client(Closing):
    """A connection to one daemon, made by `connect`. Methods block; each thread needs its own client.

    `name` is always a name or alias of a model, as the bus method FindModel takes it; methods raise NotFound for one
    that means no model. Changes raise NotAuthorized if the daemon does not permit them to this user. All methods raise
    Unavailable once the daemon has ended.
    """

    def __init__(self, connection: BlockingConnection, interactive: bool, bus: str) -> None:
        """`bus` is the address of the connection: `session`, `system` or a D-Bus address."""
        self.bus = bus
        self._interactive = interactive
        self._connection = connection
        self._subscribers: list[queue.SimpleQueue[Event | None]] = []
        self._matched = False
        self._last_layout: tuple[str, header.Header] | None = None
        connection.listen(self._on_signal, lambda: self._publish(None))

    # -- models ------------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """Returns the models that this user may see, in the order of their names."""
        (listed,) = self._manager("ListModels")
        return [model_from(path, found) for path, found in json.loads(listed).items()]

    def model(self, name: str) -> Model:
        """Returns the model of this name. Raises NotFound."""
        path = self._find(name)
        return model_from(path, self._properties(path, wire.MODEL))

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
        """Makes a model from a folder or file that this process can read, and waits for the conversion.

        Without `private`, a new version is as private as the old one, and a new model is public. Raises AlreadyExists
        if the name is taken and `replace` is false or the model is another user's, InvalidSource, StoreFull or
        TransferFailed.
        """
        job = self.begin_import(path, name, aliases=aliases, replace=replace, private=private)
        return self.model(name_of(job.wait(on_progress)["model"]))

    def begin_import(
        self, path: Path, name: str, *, aliases: Sequence[str] = (), replace: bool = True, private: bool | None = None
    ) -> Job:
        """Begins an import like `import_`. This process opens the files and passes their descriptors to the daemon."""
        options = {"aliases": Variant("as", list(aliases)), "replace": Variant("b", replace)}
        if private is not None:
            options["private"] = Variant("b", private)
        from flashd.checkpoint.source.reader import SourceFiles

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
        """Downloads a model from the Hugging Face Hub in this process, while the daemon converts what has arrived.

        `repository` may name one of several GGUF models: OWNER/NAME:Q4_K_M. `name` is by default the same. A commit
        that is in the store already is not downloaded again; another commit becomes a new version. A pull after a
        failure resumes the download.

        `token` is by default the one that huggingface_hub finds (HF_TOKEN, hf auth login); it stays in this process.
        Raises NotFound, NotAuthorized (private and gated repositories), Unavailable, StoreFull, TransferFailed,
        InvalidSource, or Busy while this user is already pulling the model.
        """
        from flashd.hub.pull import pull  # imports huggingface_hub, which few programs need

        return pull(
            self,
            repository,
            revision=revision,
            name=name,
            aliases=aliases,
            token=token,
            on_progress=on_progress,
        )

    def begin_hub_pull(self, repository: str, *, revision: str = "main", name: str = "") -> Job:
        """Begins a pull that a process of the daemon's user downloads, and returns its job: see the bus method Pull.

        The job of the machine's daemon, which has no network access, fails with Unavailable.
        """
        options = {"revision": Variant("s", revision)} | ({"name": Variant("s", name)} if name else {})
        (path,) = self._manager("Pull", "sa{sv}", repository, options)
        return self._job(path)

    def run_errand(self, job_path: str) -> None:
        """Downloads a model for another program of this user, which has called the bus method Pull."""
        from flashd.hub.pull import pull

        job = self._job(job_path)
        repository, revision, name = self._manager("ClaimPull", "o", job_path)
        pull(self, repository, revision=revision, name=name, job=job)

    def begin_pull(self, origin: str, name: str, *, aliases: Sequence[str] = (), job: Job | None = None) -> Job:
        """Begins a job for a model that this process downloads, for programs that do not use `pull`.

        `origin` is REPOSITORY@COMMIT. `job` is a claimed pull to continue instead of a new one. If the job has finished
        at once, the store has the model already; else the files follow with `feed_pull`.
        """
        options = {"job": Variant("o", job.path)} if job else {"aliases": Variant("as", list(aliases))}
        (path,) = self._manager("BeginPull", "ssa{sv}", origin, name, options)
        return self._job(path)

    def feed_pull(self, job: Job, files: Mapping[str, int], *, awaited: Collection[str] = ()) -> None:
        """Passes files of a pull, by name, as descriptors.

        The first call announces all files; those in `awaited` are stand-ins for files that have not arrived. Later
        calls pass files that have arrived. See the bus method PullFiles.
        """
        for table, fds, more in _batches(files):
            late = [file for file in table if file in awaited]
            self._manager("PullFiles", "oa{sh}asb", job.path, table, late, more, fds=fds)

    def tell_pull(self, job: Job, done_bytes: int, total_bytes: int) -> None:
        """Reports the progress of a pull's download."""
        self._manager("PullProgress", "ott", job.path, done_bytes, total_bytes)

    def fail_pull(self, job: Job, error: FlashdError) -> None:
        """Ends a pull whose download cannot continue. The job fails with `error`."""
        message, hint = error.message[:_MOST_TEXT], error.hint[:_MOST_TEXT]
        self._manager("PullFailed", "osss", job.path, error.bus_name(), message, hint)

    def remove(self, name: str) -> None:
        """Removes the model. Its checkpoint is deleted as soon as nothing uses it.

        Raises Busy while the model is active or a swap to it is running.
        """
        self._call(self._find(name), wire.MODEL, "Remove")

    def pin(self, name: str) -> None:
        """Protects the model from eviction from memory, and its older versions in the store from deletion."""
        self._call(self._find(name), wire.MODEL, "Pin")

    def unpin(self, name: str) -> None:
        """Reverses `pin`."""
        self._call(self._find(name), wire.MODEL, "Unpin")

    def evict(self, name: str) -> None:
        """Removes the model from memory; it stays in the store. Raises Busy while it is leased, active or pinned."""
        self._call(self._find(name), wire.MODEL, "Evict")

    def set_aliases(self, name: str, aliases: Sequence[str]) -> None:
        """Replaces the additional names of the model.

        Raises AlreadyExists if a name is taken, or Busy if the model would lose a name while it is active or a swap to
        it is running.
        """
        self._call(self._find(name), wire.MODEL, "SetAliases", "as", list(aliases))

    def set_private(self, name: str, private: bool) -> None:
        """Makes the model visible to its owner and root only, or to all users.

        Raises Busy while the model is active or a swap to it is running.
        """
        self._call(self._find(name), wire.MODEL, "SetPrivate", "b", private)

    def verify(self, name: str, on_progress: OnProgress | None = None) -> None:
        """Compares the checkpoint with its digests. Raises CorruptCheckpoint, which names the damaged block."""
        (path,) = self._call(self._find(name), wire.MODEL, "Verify")
        self._job(path).wait(on_progress)

    # -- swapping ----------------------------------------------------------------------------------------------------

    def swap(self, name: str, on_progress: OnProgress | None = None, *, engine: str = "") -> SwapOutcome:
        """Makes a model the active one, and returns when it can generate its first token.

        The previous model answers until then, and goes on answering after a failure. `engine` is "torch", "vllm" or
        "llama.cpp"; by default, the kind of the engine in which the model is active, else the configured one. Raises
        OutOfMemory, EngineFailed, Unsupported or CorruptCheckpoint.
        """
        with self.subscribed() as events:  # before the swap, so that the job is read only once
            return SwapOutcome.from_result(self.begin_swap(name, engine=engine).follow(events, on_progress))

    def begin_swap(self, name: str, *, engine: str = "") -> Job:
        """Begins a swap like `swap`, without waiting for its end."""
        options = {"engine": Variant("s", engine)} if engine else {}
        (path,) = self._manager("Swap", "sa{sv}", name, options)
        return self._job(path)

    def serve(self, name: str, on_progress: OnProgress | None = None, *, engine: str = "") -> SwapOutcome:
        """Has a model serve beside those that serve already; returns when its first token is possible.

        The outcome's `endpoint` is the socket of its own engine. Where there is no room for all, others make way.
        Raises what a swap raises, and then what served goes on.
        """
        with self.subscribed() as events:
            return SwapOutcome.from_result(self.begin_serve(name, engine=engine).follow(events, on_progress))

    def begin_serve(self, name: str, *, engine: str = "") -> Job:
        """Begins what `serve` does, without waiting."""
        options = {"engine": Variant("s", engine)} if engine else {}
        (path,) = self._manager("Serve", "sa{sv}", name, options)
        return self._job(path)

    def would_displace(self, name: str) -> list[str]:
        """The names of the models that would cease to serve if `serve` were called for this one now."""
        (paths,) = self._manager("WouldDisplace", "sa{sv}", name, {})
        return [name_of(path) for path in paths]

    def load(
        self, name: str, tier: str = "host", on_progress: OnProgress | None = None, *, device: str = ""
    ) -> Mapping[str, Any]:
        """Brings a model into a memory tier, "host" or "device", and waits for the end.

        `device` names the GPU if there are several. Returns `residency` (the tier), `seconds` and `size_bytes`. Raises
        OutOfMemory, CorruptCheckpoint or TransferFailed.
        """
        return self.begin_load(name, tier, device=device).wait(on_progress)

    def begin_load(self, name: str, tier: str = "host", *, device: str = "") -> Job:
        """Begins what `load` does, without waiting."""
        options = {"device": Variant("s", device)} if device else {}
        (path,) = self._manager("Load", "ssa{sv}", name, tier, options)
        return self._job(path)

    def set_idle_timeout(self, name: str, seconds: float) -> None:
        """Sets the time without requests after which a model is parked, for as long as it goes on serving.

        0 means as soon as it has answered all requests, infinity never. Raises Unavailable if it does not serve.
        """
        whole = wire.NEVER if seconds >= wire.NEVER else math.ceil(seconds)
        self._call(self._find(name), wire.MODEL, "SetIdleTimeout", "u", whole)

    def park(self, name: str = "") -> None:
        """Parks the engine of a model that serves, by default that of the active one: it gives up its weights and keeps
        its process. Raises NotFound if the model does not serve."""
        (path,) = self._call(self._find(name), wire.MODEL, "Park") if name else self._manager("Park")
        self._job(path).wait()

    def lease(self, name: str, device: str = "host") -> Lease:
        """Leases the weights of a model, which are loaded first if necessary.

        `device` is "host", a GPU such as "cuda:0", or "device" for the first GPU. Raises OutOfMemory,
        CorruptCheckpoint, TransferFailed, DeviceFailed or LimitExceeded.
        """
        return self._lease("Lease", "sa{sv}", name, {"device": Variant("s", device)})

    def lease_image(self, name: str, build: str, device: str) -> Lease:
        """Leases an image of a model that another engine of this user has published for this build.

        `build` is the same digest as for `publish_image`; `device` is a GPU such as "cuda:0". Raises NotFound if there
        is no such image.
        """
        return self._lease("LeaseImage", "sssa{sv}", name, build, device, {})

    def publish_image(self, name: str, build: str, device: str, fd: int, layout: str, size_bytes: int) -> None:
        """Publishes an image made of a model in GPU memory, so that other engines of this user can share it.

        `build` is a digest over all that the image depends on besides the checkpoint: see the bus method LeaseImage.
        `fd` is the exported allocation, which the caller still has to close. `layout` is a safetensors header as JSON.
        The daemon leases the image to this client until it disconnects; after that the image can be evicted. Raises
        OutOfMemory or AlreadyExists.
        """
        self._manager("PublishImage", "ssshsta{sv}", name, build, device, 0, layout, size_bytes, {}, fds=(fd,))

    def _lease(self, member: str, signature: str, name: str, *more: object) -> Lease:
        from flashd.checkpoint import header

        path, fd, layout, details = self._connection.call(
            *(wire.BUS_NAME, wire.ROOT_PATH, wire.MANAGER, member, signature, (name, *more)),
            timeout_s=_LEASE_S,
            interactive=self._interactive,
        )
        # Waking engines lease the same checkpoint again and again, so its layout is parsed only once.
        if self._last_layout is None or self._last_layout[0] != layout:
            parsed = header.parse(layout.encode(), data_bytes=details["size_bytes"], path=name)
            self._last_layout = layout, parsed
        return Lease(self, path, fd, self._last_layout[1], details)

    def chat(self, name: str, messages: Sequence[openai.Message], **parameters: object) -> str:
        """Asks the model or adapter `name`, which is made to serve first if it does not, and returns its whole answer.

        `messages` and `parameters` are those of OpenAI's chat completions. Raises NotFound, what a swap raises,
        InvalidArgument for a request that the engine refuses, or EngineFailed.
        """
        return "".join(self.stream_chat(name, messages, **parameters))

    def stream_chat(self, name: str, messages: Sequence[openai.Message], **parameters: object) -> Iterator[str]:
        """Yields the answer of `chat` piece by piece. Leaving the loop early ends the generation."""
        from flashd.client import openai  # here, because programs that only watch need no HTTP

        def begun(endpoint: openai.Endpoint) -> tuple[list[str], Iterator[str]]:
            pieces = openai.stream_chat(endpoint, name, messages, **parameters)
            return list(itertools.islice(pieces, 1)), pieces

        first, others = self._asked(name, begun)
        yield from first
        yield from others  # which is closed with us

    def embeddings(self, name: str, texts: Sequence[str]) -> list[list[float]]:
        """Returns one vector for each text, from the model `name`, which is made to serve first if it does not.

        Raises what `chat` raises.
        """
        from flashd.client import openai

        return self._asked(name, lambda endpoint: openai.embeddings(endpoint, name, texts))

    def _asked(self, name: str, ask: Callable[[openai.Endpoint], T]) -> T:
        """Asks a model at its address, and again where it has made way for another one in between."""
        for _ in range(_MOST_ATTEMPTS - 1):
            endpoint = self.endpoint_of(name)
            with contextlib.suppress(Busy, NotFound, Unavailable):
                return ask(endpoint)
        return ask(self.endpoint_of(name))

    def endpoint(self) -> openai.Endpoint:
        """Returns the address of the active model, for `flashd.client.openai`.

        This is the path of a Unix socket; for a user who may use models but not open the socket, it is a function that
        opens a connection.
        """
        path = self.status().endpoint
        return path if os.access(path, os.W_OK) else self.open_endpoint

    def endpoint_of(self, name: str) -> openai.Endpoint:
        """Returns the address of a model, for `flashd.client.openai`, once it serves; it is made to if it does not.

        For an adapter (engines.vllm.adapters), that is the address of its base.
        """
        try:
            outcome = self.serve(name)
        except NotFound:
            base = next((model.name for model in self.models() if name in model.adapters), None)
            if base is None:
                raise
            outcome = self.serve(base, engine="vllm")  # no other kind applies adapters
        if os.access(outcome.endpoint, os.W_OK):
            return outcome.endpoint
        path = wire.model_path(outcome.model)

        def opened() -> socket.socket:
            (fd,) = self._call(path, wire.MODEL, "OpenEndpoint")
            return socket.socket(fileno=fd)

        return opened

    def open_endpoint(self) -> socket.socket:
        """Returns a connection to the active model, opened by the daemon. Raises Unavailable if no model is active."""
        (fd,) = self._manager("OpenEndpoint")
        return socket.socket(fileno=fd)

    # -- the machine -------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Returns the state of the daemon, its store and its inbox."""
        return status_from(self._properties(wire.ROOT_PATH, wire.MANAGER))

    def engines(self) -> list[Engine]:
        """Returns the engines that this user may see."""
        return self._objects(wire.ENGINE, engine_from)

    def stop_engine(self, engine: Engine) -> None:
        """Ends the engine's process, which cuts off its answers."""
        self._call(engine.path, wire.ENGINE, "Stop")

    def environments(self) -> list[Environment]:
        """Returns the Python environments installed for engines, by kind, oldest first."""
        return [Environment(*found) for found in self._manager("ListEnvironments")[0]]

    def begin_install(self, kind: str, wheels: Sequence[Path]) -> Job:
        """Begins to install an environment for engines of a kind, "torch", "vllm" or "llama.cpp", from exactly these
        wheels.

        This process opens the wheels and passes their descriptors to the daemon. The job's result has `environment`
        (its number) and `version`.
        """
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
        """Selects the environment for new engines of a kind; 0 for flashd's own Python."""
        self._manager("UseEnvironment", "su", kind, number)

    def remove_environment(self, kind: str, number: int) -> None:
        """Deletes an environment. Raises Busy if new engines would run in it, or while an engine runs in it."""
        self._manager("RemoveEnvironment", "su", kind, number)

    def devices(self) -> list[Device]:
        """Returns the host's memory and the GPUs, with their pools."""
        return self._objects(wire.DEVICE, device_from)

    def jobs(self) -> list[Job]:
        """Returns the unfinished jobs and those finished in the last minutes, oldest first."""
        jobs = self._objects(wire.JOB, lambda path, properties: Job(self, path, properties))
        return sorted(jobs, key=lambda job: job.number)

    def job(self, number: int) -> Job:
        """Returns the job of this number. Raises NotFound some minutes after its end."""
        return self._job(wire.job_path(number))

    def scrub(self, on_progress: OnProgress | None = None) -> Mapping[str, Any]:
        """Compares the whole store with its digests, and waits for the end.

        Returns `checked` (number of checkpoints), `corrupt` (names of models) and `size_bytes`.
        """
        (path,) = self._manager("Scrub")
        return self._job(path).wait(on_progress)

    def collect(self) -> tuple[list[str], int]:
        """Deletes checkpoints that nothing uses. Returns the deleted checkpoints and the number of bytes freed."""
        removed, freed_bytes = self._manager("Collect")
        return removed, freed_bytes

    def config(self) -> str:
        """Returns the configuration in force, as TOML."""
        return str(self._manager("GetConfig")[0])

    def next_config(self) -> str:
        """Returns the configuration that a restart of the daemon would put in force, as TOML.

        Raises InvalidArgument if no daemon can start with the settings files, or if this daemon is older.
        """
        return str(self._manager("GetNextConfig")[0])

    def set_config(self, key: str, value: str) -> bool:
        """Changes the setting `key`, such as "memory.host_budget", to a TOML value, and saves it.

        Returns True if the change takes effect only after a restart. Raises InvalidArgument.
        """
        return bool(self._manager("SetConfig", "ss", key, value)[0])

    def stop(self) -> None:
        """Has the daemon stop its engines and end."""
        self._manager("Stop")

    def restart(self) -> None:
        """Has the daemon restart and keep models in memory and engines; returns before it has ended.

        Raises Unavailable if no service manager would start it again.
        """
        self._manager("Restart")

    def watch(self) -> Iterator[Event]:
        """Yields every change as it happens, until the daemon ends."""
        with self.subscribed() as events:
            while (event := events.get()) is not None:
                yield event

    @contextlib.contextmanager
    def subscribed(self) -> Iterator[queue.SimpleQueue[Event | None]]:
        """Subscribes like `watch`, for programs that wait for other things too.

        Yields a queue of all changes from now on, in which None follows the last one when the daemon ends.
        """
        if not self._matched:
            self._connection.add_match(_MATCH)
            self._connection.add_match(_GONE)
            self._matched = True
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._subscribers.append(events)
        if self._connection.has_ended:
            events.put(None)
        try:
            yield events
        finally:
            self._subscribers.remove(events)

    def close(self) -> None:
        """Closes the connection, which ends this client's leases."""
        self._connection.close()

    # -- the bus -----------------------------------------------------------------------------------------------------

    def _call(
        self, path: str, interface: str, member: str, signature: str = "", *body: object, fds: Sequence[int] = ()
    ) -> Any:
        asks = self._interactive and interface in wire.INTERFACES  # reading properties needs no authorization
        return self._connection.call(
            *(wire.BUS_NAME, path, interface, member, signature, body),
            fds=fds,
            timeout_s=_PERSON_S if asks else _CALL_S,
            interactive=asks,
        )

    def _manager(self, member: str, signature: str = "", *body: object, fds: Sequence[int] = ()) -> Any:
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

    def _on_signal(self, signal: Signal) -> None:
        match signal.interface, signal.member:
            case wire.DBUS, "NameOwnerChanged":
                if signal.body[0] == wire.BUS_NAME and not signal.body[2]:
                    self._publish(None)
            case str(i), "PropertiesChanged" if i == PROPERTIES:
                self._publish(Event("changed", signal.path, signal.body[0], signal.body[1]))
            case str(i), "InterfacesAdded" if i == OBJECT_MANAGER:
                for interface in set(signal.body[1]) & set(wire.INTERFACES):
                    self._publish(Event("added", signal.body[0], interface, signal.body[1][interface]))
            case str(i), "InterfacesRemoved" if i == OBJECT_MANAGER:
                for interface in set(signal.body[1]) & set(wire.INTERFACES):
                    self._publish(Event("removed", signal.body[0], interface, {}))
            case str(i), "Finished" if i == wire.JOB:
                self._publish(Event("finished", signal.path, i, {"State": signal.body[0]}))

    def _publish(self, event: Event | None) -> None:
        for events in list(self._subscribers):
            events.put(event)


def _batches(fds: Mapping[str, int]) -> Iterator[tuple[dict[str, int], list[int], bool]]:
    """Splits descriptors into messages that a bus accepts: (name to index, descriptors, whether more follow)."""
    names = list(fds)
    for start in range(0, max(len(names), 1), wire.FILES_PER_MESSAGE):
        batch = names[start : start + wire.FILES_PER_MESSAGE]
        more = start + wire.FILES_PER_MESSAGE < len(names)
        yield {name: index for index, name in enumerate(batch)}, [fds[name] for name in batch], more


def connect(address: str | None = None, *, interactive: bool = True, activate: bool = True) -> Client:
    """Connects to the daemon at `address`: `session`, `system` or a D-Bus address.

    The default is $FLASHD_BUS_ADDRESS, if it is set; else the first bus with a running daemon among the private bus of
    `flash start`, the session bus and the system bus. Without `interactive`, a call that needs a password is refused at
    once. Without `activate`, a stopped daemon is not started. Raises Unavailable if there is no daemon.
    """
    wanted = address or given_bus_address()
    if wanted:
        return _connected(wanted, interactive, activate)
    private = default_paths(Scope.USER).runtime / "bus"
    places = [bus_address.of_socket(private)] if private.exists() else []
    places += ["session"] if has_session_bus() else []
    for place in (*places, "system"):
        with contextlib.suppress(FlashdError):
            return _connected(place, interactive, activate)
    raise Unavailable("flashd is not running", hint="start it: flash start")


def _connected(address: str, interactive: bool, activate: bool) -> Client:
    connection = blocking.connect(address)
    try:
        (is_owned,) = connection.call(wire.DBUS, wire.DBUS_PATH, wire.DBUS, "NameHasOwner", "s", [wire.BUS_NAME])
        if not is_owned and not (activate and _activated(connection)):
            raise Unavailable(f"flashd is not running on the bus {address}", hint="start it: flash start")
    except BaseException:
        connection.close()
        raise
    return Client(connection, interactive, address)


def _activated(connection: BlockingConnection) -> bool:
    """Has the bus start the daemon, if it can, as the system bus does. Method calls never start it."""
    (names,) = connection.call(wire.DBUS, wire.DBUS_PATH, wire.DBUS, "ListActivatableNames")
    if wire.BUS_NAME not in names:
        return False
    with contextlib.suppress(FlashdError):
        start = "StartServiceByName", "su", [wire.BUS_NAME, 0]
        connection.call(wire.DBUS, wire.DBUS_PATH, wire.DBUS, *start, timeout_s=_START_S)
        return True
    return False
