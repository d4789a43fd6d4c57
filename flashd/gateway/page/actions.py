# SPDX-License-Identifier: Apache-2.0
"""Changes that the page asks for: `POST /flashd/v1/actions/ACTION`.

A body names the model: `{"model": "ada"}`. What takes long is a job, whose number is the answer, and which goes on when
its client leaves; `serve` waits for the model's turn, as each request for it does, and ends with its client.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from flashd.client.client import Client, Job
from flashd.errors import FlashdError, Internal, InvalidArgument, LimitExceeded, NotAuthorized, NotFound
from flashd.gateway.access import ACCESS
from flashd.gateway.directory import Connect
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.kept_client import KeptClient
from flashd.gateway.page.feed import Feed
from flashd.gateway.page.rights import ACTIONS, check
from flashd.gateway.pulls import is_repository

T = TypeVar("T")

_MOST_JOBS = 16  # each has a thread that waits for it
_MOST_LOOKING = 2  # who ask the daemon without changing anything: swaps use threads of the same pool
_TIERS = frozenset({"host", "device"})
_CLOSE_S = 5.0

Fields = Mapping[str, str]
Answer = dict[str, object]


class Actions:
    """On the event loop."""

    def __init__(self, dispatcher: Dispatcher, connect: Connect, feed: Feed) -> None:
        self._dispatcher = dispatcher
        self._feed = feed
        self._client = KeptClient(connect)
        self._jobs: set[asyncio.Task[None]] = set()
        self._looking = asyncio.Semaphore(_MOST_LOOKING)
        self._do: Mapping[str, Callable[[Fields], Awaitable[Answer]]] = {
            "serve": self._serve,
            "park": self._park,
            "swap": self._begins(lambda client, model, _: client.begin_swap(model)),
            "load": self._begins(lambda client, model, fields: client.begin_load(model, _tier(fields))),
            "evict": self._does(Client.evict),
            "cancel": self._cancel,
            "pin": self._does(Client.pin),
            "unpin": self._does(Client.unpin),
            "make-private": self._hides(lambda client, model: client.set_private(model, True)),
            "make-public": self._does(lambda client, model: client.set_private(model, False)),
            "remove": self._hides(Client.remove),
            "pull": self._pull,
        }

    async def run(self, name: str, fields: Mapping[str, object]) -> Answer:
        """Does it with the rights of this request's client. Raises InvalidArgument, NotAuthorized, NotFound and what
        the daemon raises."""
        if name not in ACTIONS:
            raise NotFound(f"there is no action {name[:80]!r}", hint="choose one of: " + ", ".join(ACTIONS))
        if right := ACTIONS[name].right:
            check(self._feed.state()["rights"][right])
        if not all(isinstance(value, str) for value in fields.values()):
            raise InvalidArgument("each field of an action is a text", hint='such as {"model": "ada"}')
        return await self._do[name]({key: str(value) for key, value in fields.items()})

    async def displaced(self, model: str) -> list[str]:
        """The models that would make way if this one was to serve, as far as the client may know of them."""
        found = await self._dispatcher.resolve(model)
        async with self._looking:
            names = await self._asked(lambda client: client.would_displace(found.name))
        return [name for name in names if name in self._dispatcher.directory.models]

    async def config(self) -> str:
        """The configuration in force, as the gateway's own user may know it."""
        async with self._looking:
            return await self._asked(lambda client: client.config())

    async def close(self) -> None:
        """Leaves the jobs: the daemon cancels what only we have asked for."""
        for job in self._jobs:
            job.cancel()
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=_CLOSE_S)
        self._client.end()

    async def _serve(self, fields: Fields) -> Answer:
        wanted = await self._dispatcher.wanted(_model(fields))
        await self._dispatcher.load(wanted)
        return {}

    async def _park(self, fields: Fields) -> Answer:
        model = await self._dispatcher.resolve(_model(fields))
        await self._dispatcher.unload(model.name)
        return {}

    async def _pull(self, fields: Fields) -> Answer:
        if ACCESS.get().models:
            raise NotAuthorized("this token is for some models only")
        repository = fields.get("repository", "").strip()
        if not is_repository(repository):
            raise InvalidArgument(
                f"{repository[:200]!r} is no repository of the hub", hint="write OWNER/NAME, such as Qwen/Qwen3-0.6B"
            )
        return await self._begun(lambda client: client.begin_hub_pull(repository))

    async def _cancel(self, fields: Fields) -> Answer:
        number = fields.get("number", "")
        if number not in self._feed.state()["jobs"]:
            raise NotFound(f"there is no job {number[:20]!r}")
        await self._asked(lambda client: client.job(int(number)).cancel())
        return {}

    def _does(self, do: Callable[[Client, str], None]) -> Callable[[Fields], Awaitable[Answer]]:
        async def done(fields: Fields) -> Answer:
            model = await self._dispatcher.resolve(_model(fields))
            await self._asked(lambda client: do(client, model.name))
            return {}

        return done

    def _hides(self, do: Callable[[Client, str], None]) -> Callable[[Fields], Awaitable[Answer]]:
        """Like `_does`, and whoever asks the gateway after the answer finds no such model."""

        async def done(fields: Fields) -> Answer:
            model = await self._dispatcher.resolve(_model(fields))
            await self._asked(lambda client: do(client, model.name))
            await self._dispatcher.until_hidden(model.name)
            return {}

        return done

    def _begins(self, begin: Callable[[Client, str, Fields], Job]) -> Callable[[Fields], Awaitable[Answer]]:
        async def begun(fields: Fields) -> Answer:
            model = await self._dispatcher.resolve(_model(fields))
            return await self._begun(lambda client: begin(client, model.name, fields))

        return begun

    async def _begun(self, begin: Callable[[Client], Job]) -> Answer:
        """Begins a job, which lasts as long as the connection that asked for it, and returns its number."""
        if len(self._jobs) >= _MOST_JOBS:
            raise LimitExceeded(f"{_MOST_JOBS} jobs of the page are in progress", hint="wait until one has ended")
        loop = asyncio.get_running_loop()
        number: asyncio.Future[int] = loop.create_future()

        def noted(client: Client) -> Job:
            job = begin(client)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_set, number, job.number)
            return job

        async def followed() -> None:
            try:
                await self._client.run_job(noted, lambda _: None)
            except FlashdError as error:  # a job that has begun tells of its end itself
                if not number.done():
                    number.set_exception(error)
            finally:
                if not number.done():
                    number.set_exception(Internal("the job did not begin", hint="the gateway's log has more"))

        work = asyncio.create_task(followed())
        self._jobs.add(work)
        work.add_done_callback(self._jobs.discard)
        return {"job": await number}

    async def _asked(self, ask: Callable[[Client], T]) -> T:
        def asked() -> T:
            with self._client.lent() as client:
                return ask(client)

        return await asyncio.to_thread(asked)


def _set(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)


def _model(fields: Fields) -> str:
    if not fields.get("model"):
        raise InvalidArgument("`model` is missing", hint='write {"model": "ada"}')
    return fields["model"]


def _tier(fields: Fields) -> str:
    if (tier := fields.get("tier", "host")) not in _TIERS:
        raise InvalidArgument(f"there is no tier {tier[:40]!r}", hint="choose host or device")
    return tier
