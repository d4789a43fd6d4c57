# SPDX-License-Identifier: Apache-2.0
"""Messages between daemon and engines arrive as sent; anything else is refused with an explanation."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashd.engines import codec, messages
from flashd.engines.codec import Misunderstood, Range
from flashd.engines.control import AsyncChannel, Channel, pair
from flashd.engines.engine import NO_OPTIONS, BindingRecord, ModelIdentity
from flashd.engines.messages import ArenaLayout, GivenWeights, Message, Order, Tuning
from flashd.engines.process import EngineRecord
from flashd.engines.zygote_client import ZygoteRecord
from flashd.errors import EngineFailed, EngineOutOfMemory, Unsupported

ORDERS: Mapping[str, type[Order[Message]]] = {
    **messages.ENGINE_ORDERS,
    **messages.ZYGOTE_ORDERS,
    **messages.RANK_ORDERS,
}
ANSWERS = {order.answer for order in ORDERS.values()} | {messages.Refusal}
OTHERS = {messages.PassedOn, messages.Exited, messages.Launch, EngineRecord, ZygoteRecord}
KINDS = sorted({*ORDERS.values(), *ANSWERS, *OTHERS}, key=lambda kind: kind.__name__)

FEW = settings(deadline=None, max_examples=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def values(kind: object) -> st.SearchStrategy[object]:
    """All values of a field's type, within its bounds."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        number, bounds = arguments
        assert isinstance(bounds, Range)
        numbers = st.integers if number is int else st.floats
        return numbers(bounds.least, bounds.most)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(st.text(), values(arguments[1]), max_size=3)
    if origin is not None:
        return st.one_of(*map(values, arguments))
    if kind is float:
        return st.floats(-1e18, 1e18)
    if kind is int:
        return st.integers(-(1 << 63), (1 << 63) - 1)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        parts = {field.name: values(hints[field.name]) for field in dataclasses.fields(kind)}
        return st.builds(kind, **parts)
    assert isinstance(kind, type)
    return st.from_type(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@FEW
@given(st.data())
def test_what_is_sent_is_what_is_read(kind: type, data: st.DataObject) -> None:
    message = data.draw(values(kind))
    content = json.loads(json.dumps(codec.to_json(message)))
    assert codec.from_json(kind, content) == message
    assert codec.from_json(kind, {**content, "a later version's": []}) == message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@FEW
@given(st.data())
def test_anything_else_is_refused_in_words(kind: type, data: st.DataObject) -> None:
    """A message of which any part has become something else is a message, or misunderstood: never another error."""
    content = json.loads(json.dumps(codec.to_json(data.draw(values(kind)))))
    for name in data.draw(st.sets(st.sampled_from(sorted(content)))) if content else ():
        content[name] = data.draw(JSON)
    for name in data.draw(st.sets(st.sampled_from(sorted(content)))) if content else ():
        del content[name]
    wrong = data.draw(st.just(content) | JSON)
    try:
        found = codec.from_json(kind, wrong)
    except Misunderstood as error:
        assert error.message.isprintable() and error.hint
    else:
        assert type(found) is kind


@FEW
@given(JSON)
def test_any_order_is_understood_or_refused_in_words(content: object) -> None:
    for orders in (messages.ENGINE_ORDERS, messages.ZYGOTE_ORDERS, messages.RANK_ORDERS):
        for op in ({}, *({"op": op} for op in orders)):
            spoken = {**(content if isinstance(content, dict) else {"op": content}), **op}
            try:
                messages.order_from_json(orders, spoken, "a zygote")
            except Misunderstood as error:
                assert error.message


def test_the_words_of_an_order_are_what_older_engines_know() -> None:
    """An engine that runs was started by a flashd of another version, and reads these names."""
    weights = GivenWeights("b", "ada", ("ada", "a"), ArenaLayout(5, "{}"), {"config.json": "1"}, devices=("cuda:0",))
    start = messages.Start(weights, Tuning(2, 64, ("--seed", "0"), (), 1 << 30), passes_on=True)
    assert messages.to_json(start) == {
        "op": "start",
        "binding": "b",
        "model_name": "ada",
        "names": ["ada", "a"],
        "arena_bytes": 5,
        "layout": "{}",
        "side_files": {"config.json": "1"},
        "checkpoint_layout": "",
        "devices": ["cuda:0"],
        "is_image": False,
        "wants_image": False,
        "further": [],
        "checkpoint_id": "",
        "threads": 2,
        "max_tokens_default": 64,
        "arguments": ["--seed", "0"],
        "adapters": [],
        "kv_cache_bytes": 1 << 30,
        "program": "",
        "context": 0,
        "passes_on": True,
    }
    assert messages.to_json(messages.Drain(1.5, leaving=True)) == {"op": "drain", "timeout_s": 1.5, "leaving": True}
    assert {order: kind.answer.__name__ for order, kind in ORDERS.items()} == {
        "start": "Taken",
        "wake": "Taken",
        "make_image": "Taken",
        "rebind": "Taken",
        "drain": "Done",
        "resume": "Done",
        "park": "Done",
        "state": "EngineCondition",
        "stats": "EngineLoad",
        "ready": "ZygoteBuild",
        "fork": "Forked",
        "kill": "Done",
        "ask": "RankShare",
        "made": "Done",
    }


def test_the_record_of_an_older_daemon_is_understood() -> None:
    """As f4b6580 wrote it."""
    content = {
        "version": 1, "name": "flashd-engine.3", "number": 3, "kind": "torch", "zygote": "flashd-zygote.torch.ab",
        "pid": 4711, "started_at": 1e9, "told": {"threads": 0, "max_tokens_default": 512}, "environment": {"A": "b"},
        "holdings": {
            "0011": {
                "model_name": "ada", "names": ["ada"], "checkpoint_id": "c", "private_to": None,
                "options": {"arguments": [], "kv_cache_bytes": None}, "forms": ["c"],
            }
        },
    }  # fmt: skip
    record = codec.from_json(EngineRecord, content)
    assert record.tuning == Tuning(0, 512) and record.pid == 4711
    ada = ModelIdentity("ada", ("ada",), "c", None, NO_OPTIONS)
    assert record.bindings == {"0011": BindingRecord(ada, ("c",))}
    assert codec.to_json(record)["holdings"] == content["holdings"]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ({"binding": "b"}, Misunderstood, "no gate"),
        (
            {"binding": "b", "gate": "ajar"},
            Misunderstood,
            "should be one of: open, held, leaving, parked, but is 'ajar'",
        ),
        ({"binding": ["b"], "gate": "open"}, Misunderstood, "binding.*should be a text, but is a list"),
        ({"binding": "\ud800", "gate": "open"}, Misunderstood, "Unicode"),
        ({"error": "no", "hint": "why"}, EngineFailed, "no\nwhy"),
        ({"error": "no", "unsupported": True}, Unsupported, "no"),
        ({"error": "no", "out_of_memory": True}, EngineOutOfMemory, "no"),
        ({"error": 7}, Misunderstood, "error in the refusal to state should be a text, but is 7"),
    ],
)
async def test_what_an_engine_answers_wrong_is_an_error_and_leaves_nothing_open(
    answer: dict[str, object], error: type[EngineFailed], words: str
) -> None:
    ours, theirs = pair()
    channel, engine = AsyncChannel(ours), Channel(theirs)
    memory = os.memfd_create("an engine's")
    before = len(os.listdir("/proc/self/fd"))
    asked = asyncio.create_task(channel.exchange(messages.AskCondition()))
    frame = await asyncio.to_thread(engine.receive)
    assert frame.content == {"op": "state"}
    engine.forward(dataclasses.replace(frame, content=answer))
    with pytest.raises(error, match=words):
        await asked
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(memory)
    await channel.close()
    theirs.close()


def test_a_number_is_bounded_and_is_a_number() -> None:
    for wrong in (-1, 1 << 63, 1.0, True, "1", None, []):
        with pytest.raises(Misunderstood, match="active_requests in the answer to stats"):
            messages.answer_from_json(
                messages.AskLoad(), {"active_requests": wrong, "memory_bytes": 1, "seen_requests": 1}
            )
