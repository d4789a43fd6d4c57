# SPDX-License-Identifier: Apache-2.0
"""The client of OpenAI's interface, with a server whose answers are scripted byte by byte."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from flashd.client import openai
from flashd.errors import Busy, EngineFailed, FlashdError, InvalidArgument, NotFound, Unavailable

ASK = [{"role": "user", "content": "Who are you?"}]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Engine:
    """Answers one request after another, each with `answer`, and keeps what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.answer = b""
        self.asked: list[bytes] = []
        self.reads_first = True
        self.ends = True
        self.left = threading.Event()  # the client has closed its end
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listening.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):  # the client may have left
                if self.reads_first:
                    self.asked.append(_request(peer))
                peer.sendall(self.answer)
                if self.ends:
                    peer.shutdown(socket.SHUT_WR)
                while self.reads_first and peer.recv(65536):
                    pass
            self.left.set()


def _request(peer: socket.socket) -> bytes:
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += peer.recv(65536)
    head, _, body = asked.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b": ")
        if name.lower() == b"content-length":
            while len(body) < int(value):
                body += peer.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path / "engine.sock")
    yield engine
    engine.close()


def whole(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode() + body


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode() + b"\n\n"


def words(engine: Engine) -> list[str]:
    return list(openai.stream_chat(engine.path, "ada", ASK, temperature=0))


def test_a_question_and_its_answer(engine: Engine) -> None:
    engine.answer = whole(b'{"data": [{"embedding": [1.0, 2.0]}]}')
    assert openai.embeddings(engine.path, "ada", ["é"]) == [[1.0, 2.0]]
    head, _, body = engine.asked[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/embeddings HTTP/1.1\r\n") and b"\r\nHost: flashd" in head
    assert json.loads(body) == {"model": "ada", "input": ["é"]}


def test_a_connection_that_somebody_else_made(engine: Engine) -> None:
    def connect() -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.connect(engine.path)
        return made

    engine.answer = whole(b'{"data": [{"id": "ada"}]}')
    assert openai.models(connect) == [{"id": "ada"}]
    assert engine.asked[0].startswith(b"GET /v1/models HTTP/1.1\r\n")


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_a_stream_however_it_is_cut_into_chunks(engine: Engine, size: int) -> None:
    said = [b": hello\r\n\r\n", event("I am "), event("Ada\u2028, é"), b"data: [DONE]\n\n"]
    body = b"".join(said)
    engine.answer = STREAM + b"".join(chunk(body[i : i + size]) for i in range(0, len(body), size)) + chunk(b"")
    assert words(engine) == ["I am ", "Ada\u2028, é"]
    assert json.loads(engine.asked[0].partition(b"\r\n\r\n")[2])["stream"] is True


def test_leaving_early_ends_the_generation(engine: Engine) -> None:
    engine.ends = False
    engine.answer = STREAM + chunk(event("I am ")) + chunk(event("Ada"))
    answer = openai.stream_chat(engine.path, "ada", ASK)
    assert next(answer) == "I am "
    assert not engine.left.is_set()
    answer.close()  # type: ignore[attr-defined]
    assert engine.left.wait(PATIENCE_S)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-",
        STREAM + chunk(event("I am ")),
        STREAM + chunk(event("I am ")) + b"40",
        STREAM + chunk(event("I am ")) + b"40\r\ndata: {",
        STREAM + chunk(event("I am ")) + b"not a number\r\n",
        whole(event("I am "), length=4000),
        b"\0" * 70_000,
    ],
    ids=["nothing", "in the head", "chunk", "size of a chunk", "in a chunk", "no chunk", "length", "no HTTP"],
)
def test_an_answer_that_is_cut_short(engine: Engine, answer: bytes) -> None:
    engine.answer = answer
    for ask in (lambda: words(engine), lambda: openai.models(engine.path)):
        with pytest.raises(EngineFailed, match=r"^the engine ended while it answered: \w") as failed:
            ask()
        assert failed.value.hint == "see flash status"


def test_what_came_before_an_answer_was_cut_is_given(engine: Engine) -> None:
    engine.answer = STREAM + chunk(event("I am ")) + b"40\r\ndata: {"
    answer = openai.stream_chat(engine.path, "ada", ASK)
    assert next(answer) == "I am "
    with pytest.raises(EngineFailed, match="its response is cut short"):
        next(answer)


@pytest.mark.parametrize(
    ("error", "kind"),
    [({"type": "server_error", "message": "NaN"}, EngineFailed), ({"type": "swapped", "message": "gone"}, Busy)],
)
def test_an_error_within_a_stream(engine: Engine, error: dict[str, str], kind: type[FlashdError]) -> None:
    engine.answer = STREAM + chunk(event("I am ")) + chunk(b"data: " + json.dumps({"error": error}).encode() + b"\n\n")
    with pytest.raises(kind, match=f"^{error['message']}"):
        words(engine)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("404 Not Found", NotFound), ("503 Service Unavailable", Busy), ("400 Bad Request", InvalidArgument),
        ("302 Found", InvalidArgument), ("500 Internal Server Error", EngineFailed),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("body", "message"), [(b'{"error": {"message": "no such model"}}', "no such model"), (b"<html>", "<html>")]
)
def test_a_refusal(engine: Engine, status: str, kind: type[FlashdError], body: bytes, message: str) -> None:
    engine.answer = whole(body, status)
    for ask in (lambda: words(engine), lambda: openai.models(engine.path)):
        with pytest.raises(kind) as refused:
            ask()
        assert refused.value.message == message


def test_a_refusal_before_the_question_was_read(engine: Engine) -> None:
    engine.reads_first = False
    engine.answer = whole(b'{"error": {"message": "too long"}}', "413 Content Too Large")
    long = [{"role": "user", "content": "x" * 2_000_000}]
    with pytest.raises(InvalidArgument, match="too long"):
        openai.chat(engine.path, "ada", long)


def test_nobody_answers(tmp_path: Path, engine: Engine) -> None:
    closed = tmp_path / "closed.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(closed))
    for path in (closed, tmp_path / "absent.sock"):
        with pytest.raises(Unavailable, match=f"^nothing answers at {path}\n") as refused:
            openai.models(str(path))
        assert refused.value.hint == "no model is active: flash swap MODEL"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not connect")
def test_who_may_not_connect(tmp_path: Path, engine: Engine) -> None:
    Path(engine.path).chmod(0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(Unavailable, match=r"^nothing answers at "):
            openai.models(engine.path)
    finally:
        os.seteuid(0)


def test_the_refusal_of_who_makes_the_connection_is_passed_on() -> None:
    def connect() -> socket.socket:
        raise Busy("wait")

    with pytest.raises(Busy, match="wait"):
        openai.models(connect)


@pytest.mark.parametrize("body", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_an_answer_that_is_no_object(engine: Engine, body: bytes) -> None:
    for answer, ask in (
        (whole(body), lambda: openai.models(engine.path)),
        (STREAM + chunk(b"data: " + body + b"\n\n") + chunk(b""), lambda: words(engine)),
    ):
        engine.answer = answer
        with pytest.raises(EngineFailed, match="is not a JSON object"):
            ask()


def _endless_line() -> bytes:
    return STREAM + chunk(b"data: " + b"x" * 5000)


def _whole_too_long() -> bytes:
    return whole(b"[" + b"1," * 2500 + b"1]")


def _chunked_too_long() -> bytes:
    return STREAM + b"".join(chunk(b"x" * 100) for _ in range(50)) + chunk(b"")


@pytest.mark.parametrize(
    ("answer", "asks", "what"),
    [(_endless_line, words, "line"), (_whole_too_long, lambda e: openai.models(e.path), "answer"),
     (_chunked_too_long, lambda e: openai.models(e.path), "answer")],
)  # fmt: skip
def test_answers_have_a_limit(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[], bytes],
    asks: Callable[[Engine], object],
    what: str,
) -> None:
    monkeypatch.setattr(openai, "MOST_ANSWER_BYTES", 4000)
    monkeypatch.setattr(openai, "MOST_EVENT_BYTES", 4000)
    engine.answer = answer()
    with pytest.raises(EngineFailed, match=f"^the engine's {what} is longer than 4 kB"):
        asks(engine)


def test_a_refusal_has_a_limit(engine: Engine) -> None:
    engine.answer = whole(b"x" * 1_000_000, "500 Internal Server Error")
    with pytest.raises(EngineFailed) as refused:
        openai.models(engine.path)
    assert len(refused.value.message) == 500
