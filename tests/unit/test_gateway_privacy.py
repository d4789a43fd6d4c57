# SPDX-License-Identifier: Apache-2.0
"""A request that waits for its model may lose it, or the right to it, meanwhile."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
from gateway_alone import WHISPER
from waiting import PATIENCE_S

from flashd.client.results import Engine
from flashd.config.settings import Config, GatewayConfig
from flashd.errors import NotFound, Unavailable
from flashd.gateway.access import ACCESS, Access
from flashd.gateway.directory import Directory, Wanted
from flashd.gateway.dispatch import Dispatcher, EngineRequest
from flashd.gateway.metrics.daemon_news import DaemonNews
from flashd.gateway.metrics.measures import Measures


async def test_a_model_that_became_private_while_a_request_waited_does_not_answer_it() -> None:
    is_brought, may_end = threading.Event(), threading.Event()
    asked: list[Engine] = []

    def connect(_: bool) -> Any:
        is_brought.set()
        assert may_end.wait(PATIENCE_S)
        raise Unavailable("there is no daemon in this test")

    def make(engine: Engine) -> EngineRequest:
        asked.append(engine)
        return EngineRequest("GET", "/", {}, b"")

    async def ask() -> None:
        ACCESS.set(Access(sees_private=False))
        async with dispatcher.answer(Wanted("whisper", "whisper"), make):
            pass

    measures = Measures()
    dispatcher = Dispatcher(connect, measures, DaemonNews(measures))
    stored = Directory(models={"whisper": replace(WHISPER, serving=False)}, is_connected=True, is_settled=True)
    dispatcher._note(stored)
    request = asyncio.create_task(ask())
    assert await asyncio.to_thread(is_brought.wait, PATIENCE_S)
    engine = Engine("vllm", "serving", "whisper", "Whisper", "/nowhere", 1, 0, 0, 0, "", 0, "/e/1")
    dispatcher._note(replace(stored, models={"whisper": replace(WHISPER, private=True)}, engines={"/e/1": engine}))
    try:
        with pytest.raises(NotFound):
            await request
        assert not asked
    finally:
        may_end.set()
        await dispatcher.close()


async def test_a_model_that_was_removed_before_its_request_is_not_pulled_again() -> None:
    """By its name, it might be on the hub."""
    asks = threading.Event()

    def connect(_: bool) -> Any:
        asks.set()
        raise Unavailable("there is no daemon in this test")

    measures, name = Measures(), "someone/whisper"
    dispatcher = Dispatcher(connect, measures, DaemonNews(measures))
    may_pull = Config(gateway=GatewayConfig(pull=True, change_models=True))
    empty = Directory(config=may_pull, is_connected=True, is_settled=True)
    dispatcher._note(replace(empty, models={name: replace(WHISPER, name=name)}))
    wanted = await dispatcher.wanted(name)
    dispatcher._note(empty)
    try:
        with pytest.raises(NotFound):
            await dispatcher.load(wanted)
        assert not asks.is_set()
    finally:
        await dispatcher.close()
