# SPDX-License-Identifier: Apache-2.0
"""The gateway's reading of requests, and the clients that it answers, without a daemon."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import PATIENCE_S

from flashd.client.results import Engine, Model
from flashd.config.settings import GatewayConfig
from flashd.errors import AlreadyExists, InvalidArgument, LimitExceeded, NotFound, Unavailable
from flashd.gateway import listening
from flashd.gateway import server as gateway_server
from flashd.gateway.access import ACCESS, Access
from flashd.gateway.directory import Directory
from flashd.gateway.exchange import BodyBudget, ClientLeft, Message, TooLarge, read_body
from flashd.gateway.guard import Guard
from flashd.gateway.tokens import TokenFile


def receive_of(parts: Iterable[bytes], *, leaves: bool = False) -> object:
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b""})

    async def receive() -> Message:
        return messages.pop(0)

    return receive


async def test_bodies_share_a_budget_and_give_it_back() -> None:
    budget = BodyBudget(10)
    with budget.share() as hold:
        assert await read_body(receive_of([b"abc", b"defg"]), hold) == b"abcdefg"  # type: ignore[arg-type]
        with budget.share() as other, pytest.raises(LimitExceeded):
            await read_body(receive_of([b"hijk"]), other)  # type: ignore[arg-type]
    with budget.share() as hold:
        assert len(await read_body(receive_of([b"0123456789"]), hold)) == 10  # type: ignore[arg-type]
    with budget.share() as hold, pytest.raises(ClientLeft):
        await read_body(receive_of([b"0123"], leaves=True), hold)  # type: ignore[arg-type]


async def test_a_body_is_bounded() -> None:
    with BodyBudget(1 << 40).share() as hold, pytest.raises(TooLarge):
        await read_body(receive_of([b"a" * (32 << 20)] * 3), hold)  # type: ignore[arg-type]


def model(name: str, *, private: bool = False, serving: bool = True) -> Model:
    return Model(
        name, (), "c", "A", "bf16", 1, 1, "host", (), False, False, 0, 0, 0, 0, "", f"/m/{name}", 0, private, serving
    )


def engine(number: int, name: str, state: str = "serving") -> Engine:
    return Engine("torch", state, name, "A", f"/run/{number}.sock", number, 0, 0, 0, "", 0, f"/e/{number}")


KNOWN = Directory(
    models={each.name: each for each in (model("a"), model("b", private=True), model("c", serving=False))},
    active="b",
    engines={each.path: each for each in (engine(1, "a"), engine(2, "b"), engine(3, "c"), engine(4, "a", "parked"))},
)


def test_what_is_put_away_or_older_does_not_serve() -> None:
    assert KNOWN.serving == {"a": "/run/1.sock", "b": "/run/2.sock"}
    assert KNOWN.engine_of("c") is None


def test_private_models_are_in_no_public_directory() -> None:
    public = KNOWN.public()
    assert public.serving == {"a": "/run/1.sock"} and public.active == "" and "/e/2" not in public.engines
    with pytest.raises(NotFound) as unknown:
        public.resolve("b")
    assert unknown.value.hint == "GET /v1/models lists the models, flash pull gets one"
    with pytest.raises(NotFound, match="names no model"):
        public.resolve("")


@pytest.mark.parametrize(
    ("headers", "server", "status"),
    [
        ({}, ("/run/gateway.sock", None), 200),
        ({"host": "anything"}, ("/run/gateway.sock", None), 200),
        ({"host": "localhost:8434"}, ("127.0.0.1", 8434), 200),
        ({"host": "127.0.0.2:8434"}, ("127.0.0.2", 8434), 200),
        ({"host": "[::1]:8434"}, ("::1", 8434), 200),
        ({"host": "models.lan"}, ("127.0.0.1", 8434), 200),
        ({"host": "evil.example"}, ("127.0.0.1", 8434), 403),
        ({}, ("127.0.0.1", 8434), 403),
        ({"host": "localhost", "origin": "http://localhost:3000"}, ("127.0.0.1", 8434), 200),
        ({"host": "localhost", "origin": "https://evil.example"}, ("127.0.0.1", 8434), 403),
        ({"host": "localhost", "origin": "null"}, ("127.0.0.1", 8434), 403),
        ({"host": "localhost", "sec-fetch-site": "cross-site"}, ("127.0.0.1", 8434), 403),
    ],
)
async def test_the_guard(headers: dict[str, str], server: tuple[str, int | None], status: int, tmp_path: Path) -> None:
    """Lets programs in, and pages that were named; only over the Unix socket are private models seen."""
    sent: list[Message] = []
    seen: list[bool] = []

    async def inside(scope: Message, receive: object, send: object) -> None:
        seen.append(ACCESS.get().sees_private)

    async def send(message: Message) -> None:
        sent.append(message)

    tokens = TokenFile(tmp_path / "tokens.toml")
    settings = GatewayConfig(hosts=("models.lan",), origins=("http://localhost:3000/",))
    guard = Guard(inside, tokens, lambda: settings, socket_is_ours=True)
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    await guard({"type": "http", "path": "/v1/models", "headers": listed, "server": server}, receive_of([]), send)  # type: ignore[arg-type]
    assert (sent[0]["status"] if sent else 200) == status
    assert seen == ([server[1] is None] if status == 200 else [])


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.toml")


async def asked(tokens: TokenFile, server: str, headers: dict[str, str]) -> Access | int:
    """What a request may use, or the status of its refusal."""
    sent: list[Message] = []
    found: list[Access] = []

    async def inside(scope: Message, receive: object, send: object) -> None:
        found.append(ACCESS.get())

    async def send(message: Message) -> None:
        sent.append(message)

    listed = [(name.encode(), value.encode()) for name, value in {"host": "a.lan", **headers}.items()]
    scope = {"type": "http", "path": "/v1/models", "headers": listed, "server": (server, 8434)}
    await Guard(inside, tokens)(scope, receive_of([]), send)  # type: ignore[arg-type]
    return found[0] if found else int(sent[0]["status"])


async def test_other_machines_need_a_token_until_it_is_revoked(tokens: TokenFile) -> None:
    assert await asked(tokens, "192.168.0.7", {}) == 401
    assert await asked(tokens, "192.168.0.7", {"authorization": "Bearer none"}) == 401
    secret = tokens.new("laptop", ["a", "b"])
    limited = Access(sees_private=False, models=("a", "b"), may_change_models=False, is_over_socket=False)
    for headers in ({"authorization": f"Bearer {secret}"}, {"x-api-key": secret}):
        assert await asked(tokens, "192.168.0.7", headers) == limited
        assert await asked(tokens, "127.0.0.1", headers) == limited, "it limits a program of this machine, too"
    assert await asked(tokens, "192.168.0.7", {"x-api-key": secret + "x"}) == 401
    assert await asked(tokens, "127.0.0.1", {"x-api-key": secret + "x", "host": "localhost"}) == 401
    assert isinstance(await asked(tokens, "127.0.0.1", {"x-api-key": "none", "host": "localhost"}), Access)
    TokenFile(tokens._path).revoke("laptop")  # by another process
    assert await asked(tokens, "192.168.0.7", {"x-api-key": secret}) == 401


def test_a_file_of_tokens_holds_no_secret_and_is_bounded_by_its_names(tokens: TokenFile) -> None:
    secret = tokens.new("laptop")
    assert secret.startswith("flashd-") and len(secret) > 40
    assert secret not in tokens._path.read_text() and tokens._path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(AlreadyExists):
        tokens.new("laptop")
    for name in ("", "a b", "a/b", "x" * 65, "ä"):
        with pytest.raises(InvalidArgument):
            tokens.new(name)
    with pytest.raises(NotFound):
        tokens.revoke("desk")
    assert [token.name for token in tokens.all()] == ["laptop"] and tokens.find(secret) == tokens.all()[0]


@pytest.mark.parametrize("content", [b"[laptop]\n", b"laptop = 3\n", b"\xff", b"[laptop]\ndigest = 3\n"])
def test_a_damaged_file_of_tokens_lets_nobody_in_and_is_not_overwritten(tokens: TokenFile, content: bytes) -> None:
    tokens._path.write_bytes(content)
    assert tokens.all() == []
    with pytest.raises(Unavailable, match="damaged"):
        tokens.new("desk")
    assert tokens._path.read_bytes() == content


def test_a_token_for_some_models_sees_no_others() -> None:
    limited = KNOWN.only(["c", "b"])
    assert set(limited.models) == {"c"}, "and none that is private"


async def test_first_tokens_wait_for_no_delayed_acknowledgement() -> None:
    """asyncio turns Nagle's algorithm off only where it knows that a socket is TCP's; else a token waits for 40 ms."""
    found = asyncio.get_running_loop().create_future()

    async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with listening.bound("127.0.0.1:0", has_tokens=False) as bound:
        async with await asyncio.start_server(accepted, sock=bound):
            _, writer = await asyncio.open_connection(*bound.getsockname())
            assert await found
            writer.close()


async def test_a_signal_between_two_looks_for_the_daemon_is_not_undone() -> None:
    class Connected:
        is_connected = True

        async def settled(self) -> None:
            pass

    server = SimpleNamespace(should_exit=False)
    looking = asyncio.create_task(gateway_server._end_when_alone(Connected(), 0.1, server))  # type: ignore[arg-type]
    await asyncio.sleep(0.15)
    assert not server.should_exit, "the daemon is there"
    server.should_exit = True  # as uvicorn's handler does
    async with asyncio.timeout(PATIENCE_S):
        await looking
    assert server.should_exit


async def test_the_gateway_ends_when_its_daemon_stays_away() -> None:
    class Away:
        is_connected = False

        async def settled(self) -> None:
            pass

    server = SimpleNamespace(should_exit=False)
    async with asyncio.timeout(PATIENCE_S):
        await gateway_server._end_when_alone(Away(), 0.1, server)  # type: ignore[arg-type]
    assert server.should_exit
