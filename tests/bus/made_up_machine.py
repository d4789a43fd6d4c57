# SPDX-License-Identifier: Apache-2.0
"""The gateway's page without a daemon, for pictures and for sizes that would take long to make: a machine with one GPU
of 80 GB, made up."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from listening import free_port
from waiting import until

from flashd.client.results import Device, Engine, Event, Model, Status
from flashd.config import loading
from flashd.config.settings import Config
from flashd.dbus import wire
from flashd.gateway.app import application, paths
from flashd.gateway.directory import Directory, Watches
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.exchange import Message, Receive, Send
from flashd.gateway.guard import Guard
from flashd.gateway.listening import Opened
from flashd.gateway.metrics.daemon_news import DaemonNews
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.metrics.observing import Observing
from flashd.gateway.page.endpoints import PageEndpoints
from flashd.gateway.page.feed import Feed
from flashd.gateway.page.schema import RequestState, as_json
from flashd.gateway.tokens import TokenFile

GB = 10**9
QWEN, LLAMA, WHISPER = "Qwen3ForCausalLM", "LlamaForCausalLM", "WhisperForConditionalGeneration"
# Name, architecture, gigabytes, devices, what holds it.
MODELS = (
    ("Qwen/Qwen3-8B", QWEN, 16.4, ("cuda:0", "host"), "serving"),
    ("support-de", QWEN, 16.4, ("cuda:0", "host"), ""),
    ("support-en", QWEN, 16.4, ("host",), ""),
    ("contracts", QWEN, 16.4, ("host",), "pinned"),
    ("sql-writer", LLAMA, 6.4, ("cuda:0",), "serving"),
    ("notes", LLAMA, 6.4, ("host",), ""),
    ("meeting-minutes", LLAMA, 6.4, (), ""),
    ("Qwen/Qwen3-32B", QWEN, 65.5, ("host",), ""),
    ("whisper-large-v3", WHISPER, 3.1, ("cuda:0",), "leased"),
    ("robot/arm-v2", LLAMA, 2.5, ("host",), "pinned"),
    ("robot/base-v7", LLAMA, 2.5, (), ""),
    ("poet", QWEN, 1.2, (), ""),
    ("translator-zh", QWEN, 16.4, (), ""),
    ("code-review", QWEN, 29.5, (), ""),
)


def model(name: str, kind: str, gigabytes: float, devices: tuple[str, ...], held: str, now: int) -> Model:
    tier = "device" if "cuda:0" in devices else "host" if devices else "stored"
    used = now - (len(name) * 977) % 9000 if devices else 0
    return Model(
        *(name, (), "c", kind, "BF16", int(gigabytes * GB), 291 if kind == LLAMA else 399, tier, devices),
        *(name == "Qwen/Qwen3-8B", held == "pinned", int(held in {"leased", "serving"}), now - 90_000, used, 3),
        *("", wire.model_path(name)), serving=held == "serving", context_length=40960, capabilities=("completion",),
    )  # fmt: skip


class _StandIn:
    """A client of the daemon that there is not: a 29.5 GB model would need the place of two others."""

    def config(self) -> str:
        return loading.dump(Config())

    def would_displace(self, name: str) -> list[str]:
        return ["sql-writer", "Qwen/Qwen3-8B"] if name == "code-review" else []

    def close(self) -> None:
        pass


@dataclass(slots=True)
class MadeUp:
    """The page's server, on a thread of its own, and the daemon that there is not."""

    port: int
    dispatcher: Dispatcher
    feed: Feed
    news: DaemonNews
    directory: Directory
    loop: Any
    is_far: bool = False  # whether its visitors come from another machine

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def happens(self, kind: str, path: str, interface: str, said: Mapping[str, Any]) -> None:
        """Has the daemon send a signal."""
        for watch in (self.news, self.feed.jobs):
            watch.happened(Event(kind, path, interface, said))
        self.loop.call_soon_threadsafe(self.feed.change)

    def asked(self, model: str, ago_s: float, wait_s: float, first_byte_s: float, seconds: float, tokens: int) -> None:
        """Has had a request answered."""
        said = ("/v1/chat/completions", time.time() - ago_s, wait_s, first_byte_s, seconds, 200, "", 40, tokens)
        ended = self.feed.requests._ended
        ended[str(len(ended))] = as_json(RequestState(model, *said))
        self.loop.call_soon_threadsafe(self.feed.change)

    def know(self, directory: Directory) -> None:
        self.directory = directory
        self.loop.call_soon_threadsafe(self.dispatcher._note, directory)


@contextlib.contextmanager
def made_up_machine(tokens: TokenFile, more: int = 0) -> Iterator[MadeUp]:
    """Yields the page of the machine, with as many more models."""
    found: list[MadeUp] = []
    servers: list[uvicorn.Server] = []

    def connect(_: bool) -> Any:
        return _StandIn()

    async def serve() -> None:
        import asyncio

        measures = Measures()
        news = DaemonNews(measures)
        dispatcher = Dispatcher(connect, measures, Watches([news]))
        feed = Feed(dispatcher, news, "")
        page = PageEndpoints(dispatcher, connect, feed)
        inside = application(dispatcher, connect, measures, news, Opened([]), page)
        guard = Guard(inside, tokens, lambda: dispatcher.settings)

        async def guarded(scope: Message, receive: Receive, send: Send) -> None:
            server = ("192.0.2.7", 8434) if found[0].is_far else scope.get("server")
            await guard({**scope, "server": server}, receive, send)

        port = free_port()
        config = uvicorn.Config(
            Observing(guarded, measures, feed.requests, paths=paths(inside)),
            port=port, lifespan="off", log_level="warning", timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        made = MadeUp(port, dispatcher, feed, news, Directory(), asyncio.get_running_loop())
        fill(made, more)
        found.append(made)
        servers.append(server)
        await server.serve()
        await dispatcher.close()

    def run() -> None:
        import asyncio

        asyncio.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: servers and servers[0].started)
    try:
        yield found[0]
    finally:
        found[0].loop.call_soon_threadsafe(found[0].feed.close)
        servers[0].should_exit = True
        thread.join()


def fill(made: MadeUp, more: int) -> None:
    """Has it know the machine."""
    now = int(time.time())
    models = [model(*each, now) for each in MODELS]
    models += [model(f"fine-tunes/customer-{n:04d}", QWEN, 16.4, (), "", now) for n in range(more)]
    engines = [
        _engine(1, "vllm", "serving", "Qwen/Qwen3-8B", 1.9, 27.2, 8.6),
        _engine(2, "vllm", "serving", "sql-writer", 1.4, 12.1, 3.7),
        _engine(3, "vllm", "parked", "support-en", 1.6, 1.5, 0),
    ]
    used_bytes = sum(int(each[2] * GB) for each in MODELS if "cuda:0" in each[3])
    devices = [
        Device("host", "host", "", "", 256 * GB, 192 * GB, 158 * GB, 21 * GB, 176 * GB, "shmem", *4 * (False,), "/h"),
        Device("cuda:0", "cuda", "NVIDIA H100 80GB HBM3", "u", 85 * GB, 76 * GB, used_bytes, int(25.9 * GB),
               62 * GB, "none", *4 * (True,), "/g"),
    ]  # fmt: skip
    status = Status(
        *("0.1.0", "ready", "Qwen/Qwen3-8B", "/run/flashd/openai.sock", ("/srv/models",), "/srv/store"),
        *(int(186e9), 0, int(1.1e12), ()), default_engine="vllm", default_engine_reason="there is a GPU",
    )  # fmt: skip
    made.news.status = status
    made.news._devices = {device.path: device for device in reversed(devices)}
    made.news._engines = {engine.path: engine for engine in engines}
    known = Directory({each.name: each for each in models}, "Qwen/Qwen3-8B", "", made.news._engines)
    settled = replace(known, is_connected=True, is_settled=True)
    gateway = replace(settled.config.gateway, change_models=True)
    made.directory = replace(settled, config=replace(settled.config, gateway=gateway))
    made.dispatcher._note(made.directory)


def _engine(pid: int, kind: str, state: str, model: str, host: float, device: float, cache: float) -> Engine:
    sizes = (int(host * GB), int(device * GB))
    return Engine(kind, state, model, "", "/nowhere", 4000 + pid, 0, *sizes, "image", 0, f"/e/{pid}", int(cache * GB))
