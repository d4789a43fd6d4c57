#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The time from an HTTP request at the gateway to the first token, and the gateway's own cost.

    tests/bench/gateway.py MODEL MODEL... [--engine vllm] [--python PYTHON] [--runs 30] [--rounds 5] [--json FILE]

Each MODEL is the folder of a fine-tune; all have one architecture (tests/bench/random_models.py makes some). A streamed
request names a model at the gateway's address and is timed until its first token: of the model that serves, of another
in the GPU's memory, and, by the same client in the same run, from `vllm serve` alone.

What the gateway costs beside the engine's own socket is measured with a server in the engine's place, which says in
each token when it was sent (stamping_engine.py): 64 streams at once, whose tokens are sent together, through the
gateway and directly by turns. A token that is lost, repeated or out of its place ends the benchmark. Then 1,000 clients
connect and ask nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles

from own_daemon import own_bus

import flashd
from flashd.bench.copying import device_of
from flashd.bench.report import Row, cost_row, report

PROMPT = "Hello, who are you?"
STREAMS = 64
TOKENS = 100  # of each
INTERVAL_MS = 20  # between two of one stream, about as long as a step of a large model takes
IDLE_CLIENTS = 1000
_PATIENCE_S = 500.0


class Connection:
    """A connection to a server of HTTP, as thin as can be: what the client does is in what is measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, address: str | Path | int) -> AsyncIterator[Connection]:
        """To a Unix socket, or to a port of this machine."""
        if isinstance(address, int):
            reader, writer = await asyncio.open_connection("127.0.0.1", address)
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            reader, writer = await asyncio.open_unix_connection(str(address))
        try:
            yield cls(reader, writer)
        finally:
            writer.close()

    async def events(self, model: str, max_tokens: int) -> AsyncIterator[tuple[int, bytes]]:
        """The events of a streamed answer, each with the time at which it was read (time.monotonic_ns())."""
        asked = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "stream": True, "temperature": 0}
        body = json.dumps({**asked, "max_tokens": max_tokens, "seed": 0}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        self._writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        status = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n")[0]:
            raise SystemExit(f"{model} is refused: {status!r} {await self._reader.read(2000)!r}")
        received = b""
        while True:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            received += (await self._reader.readexactly(size + 2))[:-2]
            now_ns = time.monotonic_ns()
            *whole, received = received.split(b"\n\n")
            for event in whole:
                yield now_ns, event.removeprefix(b"data: ")
            if not size:
                return

    async def first_token_s(self, model: str) -> float:
        """Seconds until an answer of one token is complete: whether a token is also text depends on the model."""
        started_ns = time.monotonic_ns()
        said = [(read_ns, event) async for read_ns, event in self.events(model, 1)]
        ends = [read_ns for read_ns, event in said if b'"finish_reason":"' in event.replace(b": ", b":")]
        if not ends:
            raise SystemExit(f"{model} does not answer: {said}")
        return (ends[0] - started_ns) / 1e9


async def first_tokens(port: int, models: Sequence[str], runs: int) -> tuple[list[float], list[float]]:
    """Seconds to the first token of the other model, and of the one that serves, by turns."""
    rebind: list[float] = []
    same: list[float] = []
    async with Connection.to(port) as connection:
        for model in models:
            print(f"first request for {model}: {await connection.first_token_s(model):.2f} s", flush=True)
        for turn in range(runs):
            model = models[turn % len(models)]
            rebind.append(await connection.first_token_s(model))
            same.append(await connection.first_token_s(model))
    other, again = (median(found) * 1e3 for found in (rebind, same))
    print(f"a first token: {again:.1f} ms of the model that serves, {other:.1f} ms of the other", flush=True)
    return rebind, same


async def delays(address: Path | int, model: str) -> list[float]:
    """Milliseconds on the way of each token, of all streams at once."""

    async def stream() -> list[float]:
        found = []
        async with Connection.to(address) as connection:
            async for read_ns, event in connection.events(model, TOKENS):
                if event != b"[DONE]":
                    token = json.loads(event)
                    if token["n"] != len(found):
                        raise SystemExit(f"token {token['n']} came in place of {len(found)}")
                    found.append((read_ns - token["sent_ns"]) / 1e6)
        if len(found) != TOKENS:
            raise SystemExit(f"{len(found)} of {TOKENS} tokens came")
        return found

    return [delay for found in await asyncio.gather(*(stream() for _ in range(STREAMS))) for delay in found]


async def overheads(port: int, engine: Path, model: str, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds that the gateway adds to a token's way: median and 99th percentile of each round."""
    medians, late = [], []
    for number in range(rounds + 1):
        direct = quantiles(await delays(engine, model), n=100)
        through = quantiles(await delays(port, model), n=100)
        print(
            f"a token's way: {direct[49]:.2f} ms (p99 {direct[98]:.2f}) from the engine's socket, "
            f"{through[49]:.2f} ms (p99 {through[98]:.2f}) through the gateway", flush=True,
        )  # fmt: skip
        if number:  # the first one makes connections
            medians.append(through[49] - direct[49])
            late.append(through[98] - direct[98])
    return medians, late


@contextlib.contextmanager
def running_gateway(bus: str, folder: Path) -> Iterator[tuple[int, int]]:
    """Its port and process."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "flashd.gateway.main", "--bus", bus, "--address", f"127.0.0.1:{port}"]
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen([*command, "--tokens", folder / "tokens.toml"], stdout=log, stderr=log)
    try:
        while not is_listening(port):
            if process.poll() is not None:
                sys.exit(f"the gateway did not come: {(folder / 'gateway.log').read_text()}")
            time.sleep(0.05)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def is_listening(address: int | Path) -> bool:
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    with closing(socket.socket(family)) as probe:
        return probe.connect_ex(("127.0.0.1", address) if isinstance(address, int) else str(address)) == 0


@contextlib.contextmanager
def in_place_of(engine: Path) -> Iterator[None]:
    """The server that stamps its tokens listens where an engine did, for as long as the context lasts."""
    aside = engine.with_name(engine.name + ".aside")
    engine.rename(aside)
    script = Path(__file__).with_name("stamping_engine.py")
    process = subprocess.Popen([sys.executable, script, engine, str(TOKENS), str(INTERVAL_MS)])
    try:
        while not is_listening(engine):
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
        aside.replace(engine)


def held_bytes(pid: int) -> int:
    """Memory that is a process's own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


async def idle_bytes(port: int, pid: int) -> float:
    """Memory of the whole gateway while clients are connected that ask nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(IDLE_CLIENTS):
            await stack.enter_async_context(Connection.to(port))
        await asyncio.sleep(1)
        return held_bytes(pid)


@contextlib.contextmanager
def vllm_serve(python: str, model: Path, folder: Path, arguments: Sequence[str]) -> Iterator[int]:
    """The port of vLLM's own server, with what flashd's engines have compiled."""
    from flashd.config.environment import child_environment
    from flashd.engines.vllm_factory import environment

    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", model.name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(2 << 30), *arguments]
    variables = child_environment(environment(folder / "state/compiled"))
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen([*command, "--disable-log-stats"], stdout=log, stderr=log, env=variables,
                                   start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not is_listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"vllm serve failed:\n{(folder / 'serve.log').read_text()[-4000:]}")
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, 9)
        process.wait()


async def served_alone(port: int, model: str, runs: int) -> list[float]:
    async with Connection.to(port) as connection:
        await connection.first_token_s(model)
        return [await connection.first_token_s(model) for _ in range(runs)]


def settings(options: argparse.Namespace) -> str:
    # With one engine for both, every request for the other model is a rebind.
    lines = f"[engines]\ndefault = '{options.engine}'\nwarm_new = false\nper_architecture = 1\n"
    if options.engine == "vllm":
        lines += f"[engines.vllm]\npython = '{options.python}'\nkv_cache = '2GiB'\narguments = {options.argument}\n"
    return lines


def measured(bus: str, models: Sequence[Path], options: argparse.Namespace, folder: Path) -> list[Row]:
    names = [model.name for model in models]
    with flashd.connect(bus) as client:
        for model in models:
            client.import_(model, model.name)
        with running_gateway(bus, folder) as (port, _):
            rebind, same = asyncio.run(first_tokens(port, names, options.runs))
        (engine,) = [engine for engine in client.engines() if engine.state == "serving"]
        socket_path = Path(engine.endpoint)
        with in_place_of(socket_path), running_gateway(bus, folder) as (port, pid):  # one that knows no other engine
            medians, late = asyncio.run(overheads(port, socket_path, engine.model, options.rounds))
            idle = asyncio.run(idle_bytes(port, pid))
    return [
        cost_row("http_rebind_first_token", [s * 1e3 for s in rebind], "ms", 30.0),
        cost_row("http_first_token", [s * 1e3 for s in same], "ms"),
        cost_row("gateway_overhead_ms", medians, "ms", 1.0),
        cost_row("gateway_overhead_p99_ms", late, "ms", 3.0),
        cost_row("gateway_idle_bytes", [idle], "B", 100e6),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--engine", choices=("torch", "vllm"), default="vllm")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--argument", action="append", default=[], help="for vLLM")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="on whose disk the store is to be; beside the first model unless given"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.python = str(Path.cwd() / options.python)
    models = [model.resolve() for model in options.models]
    device = device_of("auto")
    with tempfile.TemporaryDirectory(dir=options.folder or models[0].parent, prefix=".http-") as made:
        folder = Path(made).resolve()
        with own_bus(folder, settings(options)) as bus:
            rows = measured(bus, models, options, folder)
        if options.engine == "vllm":
            with vllm_serve(options.python, models[0], folder, options.argument) as port:
                alone = asyncio.run(served_alone(port, models[0].name, options.runs))
            rows.append(cost_row("vllm_serve_first_token", [s * 1e3 for s in alone], "ms"))
    size_gb = sum(file.stat().st_size for file in models[0].glob("*.safetensors")) / 1e9
    names = " ".join(model.name for model in models)
    command = f"tests/bench/gateway.py {names} --engine {options.engine} --runs {options.runs} ({size_gb:.1f} GB each)"
    driver, gpu = (device.kind.value, device.gpu) if device else ("host", None)
    done = report("http", command, rows, driver=driver, gpu=gpu)
    print(done.to_text())
    if options.json:
        options.json.write_text(done.to_json() + "\n")


if __name__ == "__main__":
    main()
