# SPDX-License-Identifier: Apache-2.0
"""Orders and answers on the channels between the daemon, its zygotes, its engines and their ranks.

An order has its name in `op`, and is answered by its own type of answer or by a Refusal; a notice is not an answer to
any order. Descriptors are sent along with a message, in the order given in its docstring. Engines outlive the daemon,
and so may meet another version of it: a field keeps its name and meaning for ever, and a new field has a default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, ClassVar, Generic, TypeVar, get_args

from flashd.engines import codec
from flashd.engines.codec import FLAT, Misunderstood, Range
from flashd.errors import EngineFailed, EngineOutOfMemory, FlashdError, Unsupported

A = TypeVar("A", bound="Message")
O = TypeVar("O", bound="Message")  # noqa: E741

Bytes = Annotated[int, Range(0, 1 << 62)]
Count = Annotated[int, Range(0, (1 << 63) - 1)]
ProcessId = Annotated[int, Range(1, 1 << 22)]  # PID_MAX_LIMIT of the kernel
ExitStatus = Annotated[int, Range(-64, 255)]  # negative for a signal
Seconds = Annotated[float, Range(-math.inf, math.inf)]


class GateState(StrEnum):
    """States of an engine's gate, which workers/gate.py explains."""

    OPEN = "open"
    HELD = "held"
    LEAVING = "leaving"
    PARKED = "parked"


class Message:
    """Base of all messages on a channel."""

    __slots__ = ()


class Order(Message, Generic[A]):
    """Base of messages that are answered."""

    __slots__ = ()
    op: ClassVar[str]
    answer: type[A]


def to_json(message: Message) -> dict[str, object]:
    content = codec.to_json(message)
    return {"op": message.op, **content} if isinstance(message, Order) else content


def order_from_json(kinds: Mapping[str, type[O]], content: Mapping[str, object], who: str) -> O:
    """Parses an order that `who` (an engine, a zygote) obeys. Raises Misunderstood for other messages."""
    op = content.get("op")
    if not isinstance(op, str):
        raise Misunderstood("an order has no name")
    if op not in kinds:
        raise Misunderstood(f"{who} cannot {op}", hint="the process may be of another version of flashd")
    return codec.from_json(kinds[op], content, f"the order {op}")


def answer_from_json(order: Order[A], content: Mapping[str, object]) -> A:
    """Parses the answer to an order. Raises the EngineFailed that a Refusal describes."""
    if "error" in content:
        raise codec.from_json(Refusal, content, f"the refusal to {order.op}").as_error()
    return codec.from_json(order.answer, content, f"the answer to {order.op}")


# Answers


@dataclass(frozen=True, slots=True)
class Done(Message):
    """The answer of an order that returns nothing."""


@dataclass(frozen=True, slots=True)
class Refusal(Message):
    """The answer of an order that was not carried out."""

    error: str
    hint: str = ""
    unsupported: bool = False
    out_of_memory: bool = False

    @classmethod
    def of(cls, error: FlashdError) -> Refusal:
        return cls(error.message, error.hint, unsupported=isinstance(error, Unsupported))

    def as_error(self) -> EngineFailed:
        kind = Unsupported if self.unsupported else EngineOutOfMemory if self.out_of_memory else EngineFailed
        return kind(self.error, hint=self.hint)


@dataclass(frozen=True, slots=True)
class RankImage(Message):
    """The image that one rank has made of its weights: a safetensors header as JSON, and the size of its data.

    No other process can map one that `is_own`. One descriptor, of the memory.
    """

    size_bytes: Bytes
    layout: str
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class Taken(Message):
    """The answer of an engine that has taken its weights. A descriptor for each image, in the order of ranks."""

    made: tuple[RankImage, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineCondition(Message):
    """The daemon's name of an engine's binding, or of the last one before it was parked, and the state of its gate."""

    binding: str
    gate: GateState


@dataclass(frozen=True, slots=True)
class EngineLoad(Message):
    """Load of an engine. `memory_bytes` is its own resident memory, as last measured."""

    active_requests: Count
    memory_bytes: Bytes
    seen_requests: Count


@dataclass(frozen=True, slots=True)
class ZygoteBuild(Message):
    """The modules imported by a zygote with their versions, and its workers that are still running."""

    build: Mapping[str, str]
    workers: tuple[ProcessId, ...]
    flashd: str = "of another version"


@dataclass(frozen=True, slots=True)
class Forked(Message):
    pid: ProcessId


@dataclass(frozen=True, slots=True)
class RankShare(Message):
    """The weights of one rank: the layout of its arena, which holds an image that this rank made before, or else the
    checkpoint. One descriptor, of the arena.
    """

    arena_bytes: Bytes
    layout: str
    is_image: bool
    wants_image: bool


# Orders to an engine


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """An arena, with the safetensors header of its contents as JSON."""

    arena_bytes: Bytes
    layout: str


@dataclass(frozen=True, slots=True)
class GivenWeights:
    """Weights for an engine to take. A descriptor for each arena, in the order of ranks, then one for each side file.

    `binding` is the daemon's name for the weights; `names` are those that requests may use for the model; `side_files`
    maps names to digests. An image has an arena for each rank; a checkpoint has one, which all ranks read. An engine
    that starts with an image also gets the layout of the checkpoint. `checkpoint_id` is empty if the daemon is of an
    older version.
    """

    binding: str
    model_name: str
    names: tuple[str, ...]
    first: ArenaLayout = field(metadata={FLAT: True})
    side_files: Mapping[str, str]
    checkpoint_layout: str = ""
    devices: tuple[str, ...] = ()
    is_image: bool = False
    wants_image: bool = False
    further: tuple[ArenaLayout, ...] = ()
    checkpoint_id: str = ""

    @property
    def arenas(self) -> tuple[ArenaLayout, ...]:
        return (self.first, *self.further)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Options of an engine that are fixed at its start.

    `adapters` and `kv_cache_bytes` are vLLM's; `program`, a path or empty for the usual places, and `context`, in
    tokens, are llama.cpp's.
    """

    threads: int
    max_tokens_default: int
    arguments: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    kv_cache_bytes: int = 0
    program: str = ""
    context: int = 0


@dataclass(frozen=True, slots=True)
class Start(Order[Taken]):
    """The first order to an engine. With `passes_on`, the daemon accepts clients' connections from it."""

    given: GivenWeights = field(metadata={FLAT: True})
    tuning: Tuning = field(metadata={FLAT: True})
    passes_on: bool = False

    op = "start"
    answer = Taken


@dataclass(frozen=True, slots=True)
class Wake(Order[Taken]):
    """Orders a parked engine to take weights again, and serve."""

    given: GivenWeights = field(metadata={FLAT: True})

    op = "wake"
    answer = Taken


@dataclass(frozen=True, slots=True)
class MakeImage(Order[Taken]):
    """Orders a parked engine to make an image of a checkpoint's weights, and to stay parked. An engine of an older
    version does not know this order.
    """

    given: GivenWeights = field(metadata={FLAT: True})

    op = "make_image"
    answer = Taken


@dataclass(frozen=True, slots=True)
class Rebind(Order[Taken]):
    """Orders a serving engine to take other weights in place of its own, and serve."""

    given: GivenWeights = field(metadata={FLAT: True})

    op = "rebind"
    answer = Taken


@dataclass(frozen=True, slots=True)
class Drain(Order[Done]):
    """Orders an engine to hold back new requests, or to refuse or pass them on if it is `leaving`.

    Answered when the requests in flight have ended.
    """

    timeout_s: Seconds
    leaving: bool = False

    op = "drain"
    answer = Done


@dataclass(frozen=True, slots=True)
class Resume(Order[Done]):
    """Orders an engine to admit requests again."""

    op = "resume"
    answer = Done


@dataclass(frozen=True, slots=True)
class Park(Order[Done]):
    """Orders an engine to give up the memory of its weights."""

    op = "park"
    answer = Done


@dataclass(frozen=True, slots=True)
class AskCondition(Order[EngineCondition]):
    op = "state"
    answer = EngineCondition


@dataclass(frozen=True, slots=True)
class AskLoad(Order[EngineLoad]):
    op = "stats"
    answer = EngineLoad


EngineOrder = Start | Wake | MakeImage | Rebind | Drain | Resume | Park | AskCondition | AskLoad
ENGINE_ORDERS: Mapping[str, type[EngineOrder]] = {kind.op: kind for kind in get_args(EngineOrder)}


@dataclass(frozen=True, slots=True)
class PassedOn(Message):
    """A notice from an engine with a client's connection that it no longer serves, and the bytes read from it, in
    base64. One descriptor, of the connection.
    """

    passed_on: str
    is_for_active: bool = False


# Orders to a zygote


@dataclass(frozen=True, slots=True)
class AskBuild(Order[ZygoteBuild]):
    """Asks a zygote for its imports. Answered when all are done."""

    op = "ready"
    answer = ZygoteBuild


@dataclass(frozen=True, slots=True)
class Fork(Order[Forked]):
    """Orders a zygote to fork a worker. Three descriptors: the worker's end of its channel, its log, and its listening
    socket.
    """

    op = "fork"
    answer = Forked


@dataclass(frozen=True, slots=True)
class Kill(Order[Done]):
    """Orders a zygote to kill a worker. The number of a worker that does not exist is ignored."""

    pid: ProcessId

    op = "kill"
    answer = Done


ZygoteOrder = AskBuild | Fork | Kill
ZYGOTE_ORDERS: Mapping[str, type[ZygoteOrder]] = {kind.op: kind for kind in get_args(ZygoteOrder)}


@dataclass(frozen=True, slots=True)
class Exited(Message):
    """A notice from a zygote that a worker has ended."""

    exited: ProcessId
    status: ExitStatus


@dataclass(frozen=True, slots=True)
class Launch(Message):
    """The program for a new engine unit: `python -m MODULE`, as a zygote. One descriptor, of its log."""

    python: str
    module: str
    environment: Mapping[str, str]


# Orders to the server of a vLLM engine, from its ranks


@dataclass(frozen=True, slots=True)
class AskShare(Order[RankShare]):
    rank: Count

    op = "ask"
    answer = RankShare


@dataclass(frozen=True, slots=True)
class TellMade(Order[Done]):
    """Reports the image of a rank. One descriptor, of its memory."""

    rank: Count
    image: RankImage = field(metadata={FLAT: True})

    op = "made"
    answer = Done


RankOrder = AskShare | TellMade
RANK_ORDERS: Mapping[str, type[RankOrder]] = {kind.op: kind for kind in get_args(RankOrder)}
