# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates in a separate process, which is ended if a template takes too long.

A chat template is a program that comes with a model. jinja's sandbox keeps it from accessing the machine, but not from
running for ever, in nested loops or in huge powers of numbers, where threads cannot be stopped. So the kernel limits
time and memory of the rendering process, which is replaced when it has ended.

    engine  --  keeper, which has one thread and forks  --  renderer, which compiles, renders and caches

The keeper is forked before the engine has threads or weights, and gives exactly one answer to each request.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from flashd.engines import codec
from flashd.engines.codec import Misunderstood
from flashd.engines.control import Channel, pair
from flashd.engines.messages import Message, Order, Refusal
from flashd.io import sandbox
from flashd.units import MiB

CPU_S = 2  # of CPU time, so that a busy machine is not a reason to give up
WALL_S = 30.0
MEMORY_BYTES = 512 * MiB  # in addition to the memory with which a renderer begins
MAX_TEXT_BYTES = 32 * MiB
_MAX_ERROR = 1000
_MODULE = "transformers.utils.chat_template_utils"
_ENDED: Mapping[int, str] = {
    signal.SIGPROF: f"the chat template had not ended after {CPU_S} s of CPU time",
    signal.SIGALRM: f"the chat template had not ended after {WALL_S:g} s",
}


class _Compiled(Protocol):
    """A compiled jinja template."""

    def render(self, **variables: object) -> str: ...


_Compile = Callable[[str], _Compiled]
_HAS_ENDED = "the process that renders chat templates has ended"


@dataclass(frozen=True, slots=True)
class _Rendered(Message):
    text: str


@dataclass(frozen=True, slots=True)
class _Render(Order[_Rendered]):
    source: str
    variables: Mapping[str, object]

    op = "render"
    answer = _Rendered


class Renderer:
    """The engine's side. Must be created before there are threads, because it forks."""

    def __init__(self) -> None:
        ours, theirs = pair()
        compile_template: _Compile = importlib.import_module(_MODULE)._compile_jinja_template
        compile_template("")  # imports jinja, for the forked processes too
        self._turn = threading.Lock()
        self._pid = os.getpid()
        if os.fork() == 0:
            _become_keeper(theirs, compile_template)
        theirs.close()
        self._channel = Channel(ours)

    def take_over(self) -> None:
        """Makes transformers and vLLM render all templates here, by replacing the jinja sandbox that they use."""
        sandboxed: Any = importlib.import_module("jinja2.sandbox").SandboxedEnvironment
        sandboxed.from_string = lambda environment, source, *_, **__: _Template(self, environment, source)

    def render(self, source: str, variables: Mapping[str, object]) -> str:
        """Renders a template. Raises jinja2.TemplateError: the template's own, or the reason for which it was ended."""
        if os.getpid() != self._pid:
            raise _error("only an engine's server renders templates")  # a fork would read our answers
        with self._turn:
            try:
                named = {name: _plain(value) for name, value in variables.items()}
                self._channel.send(_Render(source, named))
                answer = self._channel.receive().content
            except (OSError, EOFError, ValueError):
                raise _error(_HAS_ENDED) from None
        try:
            if "error" not in answer:
                return codec.from_json(_Rendered, answer).text
            refusal = codec.from_json(Refusal, answer)
        except Misunderstood as error:
            raise _error(error.message) from None
        raise _error(refusal.error)


class _Template:
    """The interface of a compiled template that transformers and vLLM use; it is only parsed."""

    def __init__(self, renderer: Renderer, environment: object, source: str) -> None:
        self.environment = environment
        self._renderer = renderer
        self._source = source

    def render(self, **variables: object) -> str:
        return self._renderer.render(self._source, variables)


def _error(words: str) -> Exception:
    error: Exception = importlib.import_module("jinja2").TemplateError(words)
    return error


def _plain(value: object) -> object:
    """Converts a value for JSON, because special tokens may be objects with a text."""
    match value:
        case Mapping():
            return {str(name): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    return str(value)


def _become_keeper(end: socket.socket, compile_template: _Compile) -> NoReturn:
    try:
        sandbox.end_with_parent(signal.SIGKILL)
        _close_all_but({end.fileno(), 1, 2})
        _keep(Channel(end), compile_template)
    finally:
        os._exit(0)


def _keep(engine: Channel, compile_template: _Compile) -> None:
    """Has a renderer answer one request after another, until the engine has ended."""
    renderer, pid = _forked(engine, compile_template)
    while True:
        with contextlib.suppress(EOFError, ConnectionError):
            request = engine.receive()
            try:
                renderer.forward(request)
                engine.forward(renderer.receive())
            except (EOFError, OSError, ValueError):
                renderer.socket.close()
                os.kill(pid, signal.SIGKILL)  # unless it has ended
                _, status = os.waitpid(pid, 0)
                engine.send(Refusal(_ENDED.get(-os.waitstatus_to_exitcode(status), _HAS_ENDED)))
                renderer, pid = _forked(engine, compile_template)
            continue
        return


def _forked(engine: Channel, compile_template: _Compile) -> tuple[Channel, int]:
    ours, theirs = pair()
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.end_with_parent(signal.SIGKILL)
            engine.socket.close()
            ours.close()
            _restrict()
            _render(Channel(theirs), compile_template)
        finally:
            os._exit(0)
    theirs.close()
    return Channel(ours), pid


def _restrict() -> None:
    status = Path("/proc/self/status").read_text()
    (had_kib,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:")]
    sandbox.restrict(sandbox.Limits(memory_bytes=had_kib * 1024 + MEMORY_BYTES), sockets=False)
    for number in _ENDED:
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _render(keeper: Channel, compile_template: _Compile) -> None:
    """Renders with templates that transformers compiles and caches, so that later requests need not compile them."""
    answer: Message
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = codec.from_json(_Render, keeper.receive().content)
            signal.setitimer(signal.ITIMER_PROF, CPU_S)
            signal.setitimer(signal.ITIMER_REAL, WALL_S)
            try:
                text = compile_template(request.source).render(**request.variables)
                is_too_long = len(text) > MAX_TEXT_BYTES
                answer = Refusal("the text of the chat template is too long") if is_too_long else _Rendered(text)
            except MemoryError:
                answer = Refusal("the chat template needs too much memory")
            except Exception as error:  # noqa: BLE001 -- all exceptions of a template are its refusals
                answer = Refusal((str(error) or type(error).__name__)[:_MAX_ERROR])
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            keeper.send(answer)


def _close_all_but(kept: set[int]) -> None:
    """Closes inherited descriptors, so that the engine's channel and listening socket do not outlive it in us."""
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if fd not in kept:
            with contextlib.suppress(OSError):
                os.close(fd)
