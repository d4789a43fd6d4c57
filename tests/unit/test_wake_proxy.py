# SPDX-License-Identifier: Apache-2.0
"""The wake proxy: every request to a resting model gets an answer or an error."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from flashd.daemon.events import Events
from flashd.daemon.serving.endpoint import EndpointLink, RuntimeFolder
from flashd.daemon.serving.wake_proxy import WakeProxy
from flashd.errors import OutOfMemory, Unavailable

QUESTION = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}\n"


class Served:
    """A folder with an engine that says what it was asked, and a wake proxy before it."""

    def __init__(self, folder: Path) -> None:
        self.engine = folder / "engine.sock"
        self.events = Events()
        self.proxy = WakeProxy(folder / "wake-proxy.sock", 0o600, self.wake, self.events)
        self.woken = 0
        self.error: Exception | None = None

    async def wake(self, is_question: bool) -> Path:
        if not is_question:
            raise Unavailable("the model is parked")
        self.woken += 1
        if self.error:
            raise self.error
        return self.engine

    async def say(self, said: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self.proxy.path)
        try:
            writer.write(said)
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            return b""  # it closed before it had read everything
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    with tempfile.TemporaryDirectory(prefix="fd-") as short:
        made = Served(Path(short))

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"asked: " + await reader.read())
            writer.close()

        server = await asyncio.start_unix_server(echo, made.engine)
        await made.proxy.open()
        yield made
        await made.proxy.close()
        server.close()
        await server.wait_closed()


async def test_a_question_reaches_the_engine_to_the_last_byte(served: Served) -> None:
    long = QUESTION + bytes(range(256)) * 4096
    ends = long.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    assert await served.say(long) == b"asked: " + ends, "the answer ends the connection, whatever comes next"
    assert await served.say(long.replace(b"Content", b"connection: keep-alive\r\nContent", 1)) == b"asked: " + ends
    assert served.woken == 2


async def test_what_only_looks_wakes_nobody(served: Served) -> None:
    assert (await served.say(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
    assert served.woken == 0


async def test_a_connection_that_is_passed_on_is_answered_from_what_was_read_already(served: Served) -> None:
    for cut in (0, 1, len(QUESTION) - 8, len(QUESTION)):
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        served.events.connection_passed_on(theirs, QUESTION[:cut], 1)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        writer.write(QUESTION[cut:])
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            answered = await reader.read()
        assert answered.startswith(b"asked: POST ") and answered.endswith(QUESTION[-4:])
        writer.close()
        await writer.wait_closed()


async def test_why_it_cannot_be_woken_is_told(served: Served) -> None:
    served.error = OutOfMemory("9 GB do not fit", hint="park a model")
    answer = await served.say(QUESTION)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"9 GB do not fit" in answer and b"Connection: close" in answer


@pytest.mark.parametrize(
    "said", [b"", b"POST", b"\n", b"GET / HTTP/1.1\r\n", b"x" * (1 << 18), b"GET /\n" + b"y" * (1 << 18)]
)
async def test_what_is_no_request_ends_the_connection_and_nothing_else(served: Served, said: bytes) -> None:
    await served.say(said)
    assert served.woken == 0
    assert (await served.say(QUESTION)).startswith(b"asked: ")


async def test_an_engine_that_is_gone_ends_the_connection(served: Served) -> None:
    served.engine.unlink()
    assert await served.say(QUESTION) == b""


async def test_closing_ends_those_who_wait(served: Served) -> None:
    reader, writer = await asyncio.open_unix_connection(served.proxy.path)
    writer.write(b"POST")
    await writer.drain()
    async with asyncio.timeout(PATIENCE_S):
        while not served.proxy._visits:
            await asyncio.sleep(0.01)
        await served.proxy.close()
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


def test_a_model_at_rest_is_found_by_the_next_daemon_also_after_one_of_version_0_1_0() -> None:
    with tempfile.TemporaryDirectory(prefix="fd-") as short:
        folder = Path(short) / "run"
        runtime = RuntimeFolder(folder, has_engines=True)
        runtime.note_resting("ada", "torch")
        for name in ("wake-proxy.sock", "doorman.sock"):
            (folder / name).touch()
            EndpointLink(runtime.endpoint).point_to(folder / name)
            assert runtime.resting == ("ada", "torch")
        runtime.has_engines = False
        runtime.close()
        assert not folder.exists()
