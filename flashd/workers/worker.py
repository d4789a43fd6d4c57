# SPDX-License-Identifier: Apache-2.0
"""The base of all engine processes: serves HTTP on a socket, and carries out the daemon's orders.

The event loop runs in the main thread, and orders in a second one: a model that takes long to compute a token delays
neither answers about health nor the order to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from typing import TypeVar

import uvicorn

from flashd.engines import messages
from flashd.engines.control import Channel, Frame, Parcel
from flashd.engines.messages import (
    AskCondition,
    AskLoad,
    Done,
    Drain,
    EngineCondition,
    EngineLoad,
    EngineOrder,
    GivenWeights,
    MakeImage,
    Message,
    Park,
    Rebind,
    Refusal,
    Resume,
    Start,
    Taken,
    Wake,
)
from flashd.engines.process_info import OwnMemory, lacks_memory
from flashd.errors import EngineFailed, FlashdError, Unsupported
from flashd.tasks import close_all
from flashd.workers.connections import KEEP_ALIVE_S, Application, Connections
from flashd.workers.gate import Gate

T = TypeVar("T")


class Http(uvicorn.Server):  # type: ignore[misc]
    """uvicorn without its signal handlers, because only the daemon ends this process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def receive_start(channel: Channel) -> Parcel[Start]:
    """Receives the first order. Raises EngineFailed, after reporting it to the daemon, if it is not Start."""
    frame = channel.receive()
    try:
        order = _order(frame)
        if not isinstance(order, Start):
            raise EngineFailed(f"an engine that has not started cannot {order.op}")
    except EngineFailed as error:
        channel.send(Refusal.of(error))
        raise
    return Parcel(order, frame.fds)


class Worker(ABC):
    """Carries out the daemon's orders to one engine. Subclasses implement the model."""

    def __init__(self, channel: Channel, *, passes_on: bool) -> None:
        """Must be created on the event loop. With `passes_on`, the daemon accepts clients' connections."""
        self.channel = channel
        self.gate = Gate()
        self.connections = Connections(self.gate, channel)
        self.connections.passes_on = passes_on
        self.binding = ""  # the daemon's name for the current binding, or the last one before parking
        self._loop = asyncio.get_running_loop()
        self._memory = OwnMemory()

    @abstractmethod
    def take(self, given: GivenWeights, fds: tuple[int, ...]) -> Parcel[Taken]:
        """Takes these weights, opens the gate and changes `binding`. Called on the control thread.

        The caller closes the descriptors.
        """

    def make_image(self, given: GivenWeights, fds: tuple[int, ...]) -> Parcel[Taken]:  # noqa: ARG002 -- few kinds do
        """Makes an image of these weights while parked. Called like `take`. Raises Unsupported."""
        raise Unsupported("engines of this kind make no images")

    @abstractmethod
    def let_go(self) -> None:
        """Releases the memory of the weights. Called on the control thread, with the gate shut."""

    def http(self, application: Application, *, lifespan: str = "auto") -> Http:
        config = uvicorn.Config(
            application,
            log_level="warning",
            lifespan=lifespan,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        return Http(self.connections.watch(config))

    def obey(self, first: Parcel[Start] | None = None) -> None:
        """Starts the control thread, which carries out one order after another until the daemon hangs up.

        A hang-up ends this process at once, because answers are no longer needed.
        """
        threading.Thread(target=self._obey, args=(first,), daemon=True, name="control").start()

    def open_gate(self) -> None:
        """Lets requests in for what was just taken. Called on the event loop."""
        if not self.gate.serves:
            self.connections.part()
        self.gate.open()

    def on_loop(self, step: Coroutine[object, None, T]) -> T:
        """Runs a coroutine on the event loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(step, self._loop).result()

    def call_on_loop(self, step: Callable[[], T]) -> T:
        async def called() -> T:
            return step()

        return self.on_loop(called())

    def _obey(self, first: Parcel[Start] | None) -> None:
        try:
            if first is not None:
                self._answer(lambda: first.message, first.fds)
            while True:
                frame = self.channel.receive()
                self._answer(lambda frame=frame: _order(frame), frame.fds)  # type: ignore[misc]
        except (EOFError, ConnectionError):
            os._exit(0)

    def _answer(self, order: Callable[[], EngineOrder], fds: tuple[int, ...]) -> None:
        answer = self._carried_out(order, fds)
        self.channel.send(answer.message, answer.fds)
        close_all(answer.fds)

    def _carried_out(self, order: Callable[[], EngineOrder], fds: tuple[int, ...]) -> Parcel[Message]:
        try:
            return self._do(order(), fds)
        except FlashdError as error:
            return Parcel(Refusal.of(error))
        except Exception as error:  # noqa: BLE001 -- the boundary of an order: frameworks raise all kinds of exceptions
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            return Parcel(Refusal(said, out_of_memory=lacks_memory(said)))
        finally:
            close_all(fds)

    def _do(self, order: EngineOrder, fds: tuple[int, ...]) -> Parcel[Message]:
        match order:
            case Start() | Wake() | Rebind():
                taken = self.take(order.given, fds)
                return Parcel(taken.message, taken.fds)
            case MakeImage(given):
                made = self.make_image(given, fds)
                return Parcel(made.message, made.fds)
            case Drain(timeout_s, leaving):
                self.on_loop(self.gate.drain(timeout_s, leaving=leaving))
            case Resume():
                self.call_on_loop(self.gate.open)
            case Park():
                self.call_on_loop(self.gate.park)
                self.let_go()
            case AskCondition():
                return Parcel(EngineCondition(self.binding, self.call_on_loop(lambda: self.gate.state)))
            case AskLoad():
                return Parcel(EngineLoad(self.gate.active, self._memory.last_bytes(), self.gate.seen))
        return Parcel(Done())


def _order(frame: Frame) -> EngineOrder:
    return messages.order_from_json(messages.ENGINE_ORDERS, frame.content, "an engine")
