# SPDX-License-Identifier: Apache-2.0
"""A stand-in for an engine that states in each token when it was sent, as no real engine does.

    python stamping_engine.py SOCKET TOKENS INTERVAL_MS

Every streamed request gets TOKENS tokens, numbered. All requests get their next one together, as from a batch of an
engine, every INTERVAL_MS; the time between the tokens of one batch is what it takes to write them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_DONE = b"data: [DONE]\n\n"


def token(number: int) -> bytes:
    """An event as of vLLM's chat completions, and the time."""
    delta = {"index": 0, "delta": {"content": f" {number}"}, "logprobs": None, "finish_reason": None}
    chunk = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [delta]}
    return b"data: " + json.dumps(chunk | {"n": number, "sent_ns": time.monotonic_ns()}).encode() + b"\n\n"


class Connection(asyncio.Protocol):
    """One connection, on which one request after the other is answered."""

    def __init__(self, answering: dict[Connection, int]) -> None:
        self._answering = answering
        self._received = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._answering.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
        if blank and len(body) >= int(fields.get(b"content-length", b"0")):
            self._received = b""
            self.transport.write(_HEAD)
            self._answering[self] = 0

    def send(self, content: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(content), content))


async def serve(socket_path: str, tokens: int, interval_s: float) -> None:
    answering: dict[Connection, int] = {}
    await asyncio.get_running_loop().create_unix_server(lambda: Connection(answering), socket_path, backlog=1024)
    next_s = time.monotonic()
    while True:
        next_s = max(next_s + interval_s, time.monotonic())
        await asyncio.sleep(next_s - time.monotonic())
        for connection, sent in list(answering.items()):
            if sent < tokens:
                answering[connection] = sent + 1
                connection.send(token(sent))
            else:
                del answering[connection]
                connection.send(_DONE)
                connection.transport.write(b"0\r\n\r\n")


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1e3))
