# SPDX-License-Identifier: Apache-2.0
"""Carries a request through its turn to the engine that serves its model, and the answer back.

The engine itself has the last word on which model it answers as: requests name their model, and one that comes to an
engine which serves another model by then is refused by it (404), and waits for its turn again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from aiohttp import ClientError, ClientResponse

from flashd.client.results import Engine, Model
from flashd.config.settings import GatewayConfig
from flashd.errors import FlashdError, Internal, NotFound, Unavailable, Unsupported
from flashd.gateway.access import ACCESS
from flashd.gateway.directory import LATEST, Connect, Directory, Follower, Wanted, Watch
from flashd.gateway.engine_connections import EngineConnections
from flashd.gateway.keep_alive import KEEP_ALIVE, KeepAlive
from flashd.gateway.kept_client import KeptClient, Progress
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.metrics.observed import observed
from flashd.gateway.pulls import Pulls, is_repository, stopping
from flashd.gateway.turns import Ask, Bring, Ticket, Turns

T = TypeVar("T")

log = logging.getLogger(__name__)

_MOST_ATTEMPTS = 8
_UNLOAD_S = 5.0  # for a model that nobody asks
_CLOSE_S = 5.0  # for a swap or pulls to be cancelled
_FIRST_S = 60.0  # for the daemon to start, with a thousand models
_LISTED_S = 10.0  # until a model that was pulled must be listed, or one that was made private hidden
_STALE_S = 0.25  # until the news of a swap by somebody else must have come
_MAX_REFUSAL_BYTES = 64 << 10
_STARTS = "switching"  # a swap's state that lasts so long only where an engine starts
_APPLY_ADAPTERS = frozenset({"vllm"})  # kinds of engines


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as an engine gets it. Its body names the model, so that an engine which has another one refuses it."""

    method: str
    target: str  # path and query
    headers: Mapping[str, str]
    body: bytes


Make = Callable[[Engine], EngineRequest]  # the request that suits an engine, made when its model's turn has come


class Dispatcher:
    """The queue of all requests, and the swaps that they need. On one event loop."""

    def __init__(self, connect: Connect, measures: Measures, watch: Watch) -> None:
        self._client = KeptClient(connect)
        self.pulls = Pulls(self._client, lambda: self.settings.max_waiting, self._until_listed)
        self._measures = measures
        self._turns = Turns()
        self._connections = EngineConnections()
        self._keep_alive = KeepAlive(self._keep)
        self._progress = Progress()  # of the model that is being brought
        self._follower = Follower(connect, self._heard, watch)
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()  # set and replaced whenever the daemon says something new
        self._work: asyncio.Task[None] | None = None
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        self._known = self._public = Directory()
        self._is_stopping = False
        self.on_news: Callable[[], None] = lambda: None  # called whenever there is something new to see

    @property
    def directory(self) -> Directory:
        """What the client of this request may know of the daemon's models."""
        access = ACCESS.get()
        known = self._known if access.sees_private else self._public
        return known.only(access.models) if access.models else known

    @property
    def is_connected(self) -> bool:
        """True while a daemon runs."""
        return self._known.is_connected

    @property
    def settings(self) -> GatewayConfig:
        return self._known.config.gateway

    def start(self) -> None:
        self._follower.start()

    def stop_waiting(self) -> None:
        """Refuses the requests that wait, and those that come from now on. Those that are answered go on."""
        self._is_stopping = True
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(stopping())
        self.pulls.stop()
        self._news()

    async def close(self) -> None:
        self._follower.stop()
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait({self._work}, timeout=_CLOSE_S)
        await self.pulls.close(_CLOSE_S)
        self._client.end()
        await self._keep_alive.close()
        await self._connections.close()

    async def settled(self) -> None:
        """Returns when the daemon was asked what there is, whether or not it answered."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_S):
                while not self._known.is_settled and not self._is_stopping:
                    await self._changed.wait()

    async def resolve(self, name: str) -> Model:
        """Finds a model as Directory does, also one that the daemon has had for a moment only. Raises NotFound."""
        return await self._patiently(lambda: self.directory.resolve(name))

    async def described(self, name: str) -> tuple[str, Model]:
        """Finds a model like `resolve`, or else the base of an adapter, and the name of what was found."""
        wanted = await self._patiently(lambda: self.directory.wanted(name))
        return wanted.name, self.directory.resolve(wanted.model)

    async def wanted(self, name: str) -> Wanted:
        """What is to answer a request. A model of the hub that is not here yet, `answer` and `load` pull first, where
        `gateway.pull` and the rights of the client permit it. Raises NotFound."""
        try:
            return await self._patiently(lambda: self.directory.wanted(name))
        except NotFound as error:
            name = name.removesuffix(LATEST)
            if not is_repository(name):
                raise
            if why_not := self._cannot_pull():  # the same words for a model that is here, but not for this client
                raise NotFound(error.message, hint=f"{error.hint}; {why_not}") from None
            if self.is_here(name):
                raise
            return Wanted(name, name, is_to_be_pulled=True)

    async def _patiently(self, find: Callable[[], T]) -> T:
        """What `find` returns before, or as soon as, the latest news has come. Raises NotFound like `find`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STALE_S):
                while True:
                    with contextlib.suppress(NotFound):
                        return find()
                    await self._changed.wait()
        return find()

    def is_here(self, name: str) -> bool:
        """Tells whether there is a model of this name, whether or not the client of this request may know of it."""
        with contextlib.suppress(NotFound):
            return bool(self._known.resolve(name))
        return False

    def _cannot_pull(self) -> str:
        """Why the models of the hub that this request names are not pulled; empty if they are."""
        if not self.settings.pull:
            return "requests would pull it from the hub with the setting gateway.pull"
        why_not = ACCESS.get().cannot_change_models(self.settings)
        return why_not and f"to have it pulled, {why_not}"

    @contextlib.asynccontextmanager
    async def answer(self, wanted: Wanted, make: Make) -> AsyncIterator[ClientResponse]:
        """The engine's answer, from its head on; the model's turn lasts at least until the context ends.

        Leaving the context closes the engine's connection if the answer was not read to its end, which ends its
        generation. Raises NotFound, LimitExceeded, Unavailable and what a swap or a pull raises.
        """
        model = wanted.model
        arrived = time.monotonic()
        await self._until_here(wanted)
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            async with self._turn(model, arrived):
                changed = self._changed
                is_last = attempt == _MOST_ATTEMPTS
                async with contextlib.AsyncExitStack() as stack:
                    response = None
                    try:
                        response = await stack.enter_async_context(self._asked(wanted, make))
                    except Unavailable:  # it ended, or made way for another, in this moment
                        if is_last:
                            raise
                    if response is not None and (is_last or not await self._is_elsewhere(response)):
                        yield response
                        return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), _STALE_S)
            self._known.resolve(model)  # it may be gone

    async def load(self, wanted: Wanted) -> None:
        """Returns when a model serves, after its turn has come. Raises like `answer`."""
        arrived = time.monotonic()
        await self._until_here(wanted)
        async with self._turn(wanted.model, arrived):
            pass

    async def unload(self, model: str) -> None:
        """Has a model cease to serve as soon as it has answered all, if it serves. Raises NotFound."""
        self.directory.resolve(model)
        if model in self._known.serving:
            with contextlib.suppress(NotFound, Unavailable):  # it has ceased to already
                await asyncio.to_thread(self._keep, model, 0.0)
            if not self.is_asked(model):
                await self._until(lambda known: model not in known.serving, _UNLOAD_S)

    async def until_hidden(self, model: str) -> None:
        """Returns when a model that was just made private, or removed, is no longer shown to others."""
        await self._until(lambda known: model not in known.public().models, _LISTED_S)

    def why_waiting(self, model: str) -> str:
        """What the requests for a model wait for, in a few words."""
        if (pulled := self.pulls.progress(model)) is not None:
            return _said(f"pulling {model}", pulled)
        if self._turns.bringing == model:
            if self._progress.phase == _STARTS:
                return f"loading {model}: its engine starts"
            return _said(f"loading {model}", self._progress)
        return f"{model} waits for its engine"

    def is_asked(self, model: str) -> bool:
        """True while requests for a model are answered or wait."""
        return bool(self.in_progress(model) or self.waiting(model))

    def waiting(self, model: str) -> int:
        """How many requests for a model wait for its turn."""
        return self._turns.waiting(model)

    def in_progress(self, model: str) -> int:
        """How many requests for a model are answered now."""
        return self._turns.inside(model)

    def _asked(self, wanted: Wanted, make: Make) -> contextlib.AbstractAsyncContextManager[ClientResponse]:
        self.directory.resolve(wanted.model)  # it may have become private, or been removed, while the request waited
        if (engine := self._known.engine_of(wanted.model)) is None:
            raise Unavailable(f"{wanted.model} ceased to serve", hint="ask again")
        if wanted.name != wanted.model and engine.kind not in _APPLY_ADAPTERS:
            what = f"{wanted.name} is an adapter of {wanted.model}, whose {engine.kind} engine applies none"
            raise Unsupported(what, hint=run_by_vllm(wanted.model, engine.kind))
        request = make(engine)
        headers = observed().asked(request.headers)
        return self._connections.answer(engine.endpoint, request.method, request.target, headers, request.body)

    @staticmethod
    async def _is_elsewhere(response: ClientResponse) -> bool:
        """True for the refusal of an engine that serves another model by now. Its body is put back if it is not."""
        if response.status not in {404, 503} or (response.content_length or _MAX_REFUSAL_BYTES) >= _MAX_REFUSAL_BYTES:
            return False
        with contextlib.suppress(ValueError, AttributeError, TypeError, ClientError):
            raw = await response.read()  # kept in the response: what reads it later gets the same
            error = json.loads(raw)["error"]
            return bool(error.get("param") == "model" if response.status == 404 else error.get("code") == "not_serving")
        return False

    @contextlib.asynccontextmanager
    async def _turn(self, model: str, arrived: float) -> AsyncIterator[None]:
        """A request's time inside, after its time in the queue."""
        admitted: asyncio.Future[None] = self._loop.create_future()

        def admit() -> None:
            if not admitted.done():
                admitted.set_result(None)

        if self._is_stopping:
            raise stopping()
        request = observed()
        request.queued(model)
        ticket = self._turns.ask(model, time.monotonic(), admit, arrived=arrived)
        self._waiters[ticket] = admitted
        try:
            self._step()
            self.on_news()
            await admitted
            request.admitted()
            self.on_news()
            self._keep_alive.asked(model, KEEP_ALIVE.get())
            yield
        finally:
            del self._waiters[ticket]
            self._turns.leave(ticket)
            self._step()
            self.on_news()

    def _step(self) -> None:
        """Lets in who may enter, and begins what is to be done for those who wait."""
        if self._work is not None:
            model = self._turns.bringing
            is_wanted = model is None or self._turns.waiting(model) or self._turns.inside(model)
            if not is_wanted and not self._work.cancelling():
                self._work.cancel()  # all who waited for it have left
            self._turns.next_step(time.monotonic())
            return
        match self._turns.next_step(time.monotonic()):
            case Ask(model):
                work = self._ask(model)
            case Bring(model):
                self._turns.begin(model, time.monotonic())
                self._progress = Progress()
                work = self._bring(model)
            case None:
                return
        self._work = self._loop.create_task(work, name=f"for {model}")
        self._work.add_done_callback(partial(self._done, model))

    def _done(self, model: str, work: asyncio.Task[None]) -> None:
        self._work = None
        if not work.cancelled() and (failure := work.exception()) is not None:
            log.error("%s could not be brought, for an unforeseen reason", model, exc_info=failure)
            self._refuse(model, Internal(f"{model} could not be loaded", hint="the gateway's log has more"))
        elif self._turns.bringing is not None:
            self._turns.given_up()
        self._step()

    async def _ask(self, model: str) -> None:
        """Finds out what would make way for a model."""
        serving = frozenset(self._known.serving)
        try:
            displaced = await asyncio.to_thread(self._would_displace, model) if serving else []
        except FlashdError as error:
            self._refuse(model, error)
        else:
            if serving == frozenset(self._known.serving):  # else it is asked again
                self._turns.displaces(model, frozenset(displaced))

    def _would_displace(self, model: str) -> list[str]:
        """Runs in a thread."""
        with self._client.lent() as client:
            return client.would_displace(model)

    async def _bring(self, model: str) -> None:
        """Has the daemon swap; those who wait are told if it fails. Cancelling it cancels the swap, if that can be."""
        try:
            await self._client.run_job(lambda client: client.begin_serve(model), self._note_progress)
        except FlashdError as error:
            self._refuse(model, error)
        else:
            await self._until_serving(model)
            self._turns.brought(time.monotonic())

    async def _until_serving(self, model: str) -> None:
        """Returns when the signal that it serves has come, too; it is a little later than the end of the job."""
        await self._until(lambda known: model in known.serving, _STALE_S)

    async def _until(self, is_so: Callable[[Directory], bool], patience_s: float) -> None:
        """Returns when the daemon's signals have said so, or should have long ago."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while not is_so(self._known):
                    await self._changed.wait()

    def _note_progress(self, progress: Progress) -> None:
        self._progress = progress

    async def _until_here(self, wanted: Wanted) -> None:
        """Pulls a model that `wanted` found to be on the hub only. Raises NotFound, also for one that has come to be
        here meanwhile and that the client of this request may not know of, and for one that was removed."""
        model = wanted.model
        is_missing = wanted.is_to_be_pulled and not self.is_here(model)
        if is_missing and not self._cannot_pull():
            async with self.pulls.joined(model) as pull:
                async for _ in pull.steps():
                    pass
        self.directory.resolve(model)

    async def _until_listed(self, model: str) -> None:
        await self._until(lambda known: model in known.models, _LISTED_S)

    def _keep(self, model: str, keep_s: float) -> None:
        """Runs in a thread."""
        with self._client.lent() as client:
            client.set_idle_timeout(model, keep_s)

    def _refuse(self, model: str, error: FlashdError) -> None:
        for ticket in self._turns.failed(model):
            if (waiter := self._waiters.get(ticket)) is not None and not waiter.done():
                waiter.set_exception(error)

    def _heard(self, directory: Directory) -> None:
        """Called by the follower's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._note, directory)

    def _note(self, directory: Directory) -> None:
        self._known, self._public = directory, directory.public()
        if not directory.is_connected:
            self._client.close()
        self._measures.models_are(directory.models)
        self._news()
        self._turns.turn_s, self._turns.max_waiting = directory.config.engines.turn_s, self.settings.max_waiting
        self._turns.serving(directory.serving, time.monotonic())
        self._keep_alive.serving(directory.serving)
        self._step()
        self.on_news()

    def _news(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _said(what: str, progress: Progress) -> str:
    return f"{what}: {progress}" if progress.phase else what


def run_by_vllm(model: str, kind: str) -> str:
    """A hint for a model that serves in an engine, of this kind, which cannot do what is asked."""
    if kind == "llama.cpp":  # which has GGUF models, and no other engine does
        return "ask the same model as safetensors instead, in a vLLM engine"
    return f"have vLLM run it: flash config models.{model}.engine vllm"
