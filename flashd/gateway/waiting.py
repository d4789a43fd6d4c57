# SPDX-License-Identifier: Apache-2.0
"""Tells the client of a stream what it waits for, while its model is loaded or waits for its turn.

A stream that waits for more than two seconds begins with pieces that clients skip, so that neither they nor a proxy
give up: comments, pings, or lines without text. A client that asks for words gets them as text of the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from flashd.gateway.answering import Asked, Sending
from flashd.gateway.dispatch import Dispatcher

HEADER = b"x-flashd-progress"
EVENTS = "text/event-stream; charset=utf-8"
_QUIET_S = 2.0
_EVERY_S = 1.0

# Makes a piece of a stream of words; the flag is whether they become text of the answer.
Piece = Callable[[str, bool], bytes]


class Waiting:
    """A context in which a stream is begun if it lasts. Call `over` before the answer itself is sent."""

    def __init__(
        self, asked: Asked, send: Sending, dispatcher: Dispatcher, model: str, piece: Piece, media_type: str = EVENTS
    ) -> None:
        self._send = send
        self._dispatcher = dispatcher
        self._model = model
        self._piece = piece
        self._media_type = media_type
        wanted = asked.header(HEADER) or str(int(dispatcher.settings.progress))
        self._as_text = wanted.lower() not in {"0", "false", "no", "off"}
        self._telling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._send.is_stream:
            self._telling = asyncio.create_task(self._tell())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.over()

    async def over(self) -> None:
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.cancel()
            await asyncio.wait({telling})  # which passes on our own cancellation, as awaiting it would not

    async def _tell(self) -> None:
        await asyncio.sleep(_QUIET_S)
        await self._send.begin_stream(self._media_type)
        while True:
            await self._send.piece(self._piece(self._dispatcher.why_waiting(self._model), self._as_text))
            await asyncio.sleep(_EVERY_S)
