# SPDX-License-Identifier: Apache-2.0
"""Who asks a model that rests gets its answer or an error, whatever it sends and whatever the model does."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flashd.daemon.doorman import Doorman
from flashd.errors import OutOfMemory

QUESTION = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}\n"


class Place:
    """A folder with an engine that says what it was asked, and a doorman before it."""

    def __init__(self, folder: Path) -> None:
        self.engine = folder / "engine.sock"
        self.doorman = Doorman(folder / "doorman.sock", 0o600, self.wake)
        self.woken = 0
        self.error: Exception | None = None

    async def wake(self) -> Path:
        self.woken += 1
        if self.error:
            raise self.error
        return self.engine

    async def say(self, said: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self.doorman.path)
        try:
            writer.write(said)
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            return b""  # it did not want to hear all of that
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    with tempfile.TemporaryDirectory(prefix="fd-") as short:
        made = Place(Path(short))

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"asked: " + await reader.read())
            writer.close()

        server = await asyncio.start_unix_server(echo, made.engine)
        await made.doorman.open()
        yield made
        await made.doorman.close()
        server.close()
        await server.wait_closed()


async def test_a_question_reaches_the_engine_to_the_last_byte(place: Place) -> None:
    long = QUESTION + bytes(range(256)) * 4096
    assert await place.say(long) == b"asked: " + long
    assert place.woken == 1


async def test_what_only_looks_wakes_nobody(place: Place) -> None:
    assert (await place.say(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
    assert place.woken == 0


async def test_why_it_cannot_be_woken_is_told(place: Place) -> None:
    place.error = OutOfMemory("9 GB do not fit", hint="park a model")
    answer = await place.say(QUESTION)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"9 GB do not fit" in answer and b"Connection: close" in answer


@pytest.mark.parametrize(
    "said", [b"", b"POST", b"\n", b"GET / HTTP/1.1\r\n", b"x" * (1 << 18), b"GET /\n" + b"y" * (1 << 18)]
)
async def test_what_is_no_request_ends_the_connection_and_nothing_else(place: Place, said: bytes) -> None:
    await place.say(said)
    assert place.woken == 0
    assert (await place.say(QUESTION)).startswith(b"asked: ")


async def test_an_engine_that_is_gone_ends_the_connection(place: Place) -> None:
    place.engine.unlink()
    assert await place.say(QUESTION) == b""


async def test_closing_ends_those_who_wait(place: Place) -> None:
    reader, writer = await asyncio.open_unix_connection(place.doorman.path)
    writer.write(b"POST")
    await writer.drain()
    async with asyncio.timeout(10):
        while not place.doorman._visits:
            await asyncio.sleep(0.01)
        await place.doorman.close()
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
