# SPDX-License-Identifier: Apache-2.0
"""Pulls from the Hugging Face Hub that requests wait for. All who wait for one repository share a pull, which the
daemon does, and which is cancelled when the last of them leaves; the next one resumes it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from flashd.errors import LimitExceeded, Unavailable
from flashd.gateway.kept_client import KeptClient, Progress

_MOST_AT_ONCE = 8  # each has a process that downloads, and a thread that waits for it
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(?::[\w.-]{1,64})?", re.ASCII)


def is_repository(name: str) -> bool:
    """Tells whether a name looks like that of a repository of the hub, OWNER/NAME, or of one of its GGUF models."""
    return _REPOSITORY.fullmatch(name) is not None


def stopping() -> Unavailable:
    """The error of what waits when the gateway is stopped."""
    return Unavailable("the gateway is stopping", hint="ask again in a moment")


class Pull:
    """A pull in progress, until its model is listed. `waiting` is how many wait for it."""

    def __init__(self, client: KeptClient, repository: str, until_listed: Callable[[str], Awaitable[None]]) -> None:
        self.progress = Progress()
        self.waiting = 0
        self._changed = asyncio.Event()  # set and replaced whenever there is progress
        self.work = asyncio.ensure_future(self._done(client, repository, until_listed))
        self.work.add_done_callback(lambda _: self._changed.set())

    @property
    def is_cancelled(self) -> bool:
        return bool(self.work.cancelling())

    async def steps(self) -> AsyncGenerator[Progress, None]:
        """Yields how far it is at first and whenever that changes, until its end. Raises what the pull raises, or
        Unavailable if the gateway stops."""
        while not self.work.done():
            changed = self._changed
            yield self.progress
            await changed.wait()
        if self.work.cancelled():
            raise stopping()
        self.work.result()

    async def _done(self, client: KeptClient, repository: str, until_listed: Callable[[str], Awaitable[None]]) -> None:
        await client.run_job(lambda lent: lent.begin_hub_pull(repository), self._note)
        await until_listed(repository)

    def _note(self, progress: Progress) -> None:
        self.progress = progress
        self._changed.set()
        self._changed = asyncio.Event()


class Pulls:
    """The pulls in progress, by repository. On one event loop."""

    def __init__(
        self, client: KeptClient, max_waiting: Callable[[], int], until_listed: Callable[[str], Awaitable[None]]
    ) -> None:
        """`max_waiting` returns how many may wait for one pull; `until_listed` waits for the news of its model."""
        self._client = client
        self._until_listed = until_listed
        self._max_waiting = max_waiting
        self._pulls: dict[str, Pull] = {}
        self._is_stopping = False

    def progress(self, repository: str) -> Progress | None:
        """How far its pull is; None if it is not being pulled."""
        return self._pulls[repository].progress if repository in self._pulls else None

    @contextlib.asynccontextmanager
    async def joined(self, repository: str) -> AsyncIterator[Pull]:
        """Begins a pull or joins the one in progress, until the end of the context.

        Raises LimitExceeded, or Unavailable if the gateway stops.
        """
        while (pull := self._pulls.get(repository)) is not None and pull.is_cancelled:
            await asyncio.wait({pull.work})
        if self._is_stopping:
            raise stopping()
        if pull is None:
            if len(self._pulls) >= _MOST_AT_ONCE:
                raise LimitExceeded(f"{len(self._pulls)} pulls are in progress already", hint="try again later")
            pull = self._pulls[repository] = Pull(self._client, repository, self._until_listed)
            pull.work.add_done_callback(lambda work: self._ended(repository, work))
        elif pull.waiting >= self._max_waiting():
            raise LimitExceeded(f"{pull.waiting} requests wait for {repository} already", hint="try again in a moment")
        pull.waiting += 1
        try:
            yield pull
        finally:
            pull.waiting -= 1
            if not pull.waiting:
                pull.work.cancel()

    def stop(self) -> None:
        """Cancels all pulls, and refuses others from now on."""
        self._is_stopping = True
        for pull in self._pulls.values():
            pull.work.cancel()

    async def close(self, most_s: float) -> None:
        """Waits for the ends of all pulls, which it cancels, for so long at most."""
        self.stop()
        if ending := {pull.work for pull in self._pulls.values()}:
            await asyncio.wait(ending, timeout=most_s)

    def _ended(self, repository: str, work: asyncio.Task[None]) -> None:
        del self._pulls[repository]
        if not work.cancelled():
            work.exception()  # retrieved, lest asyncio log it when no request waits any more
