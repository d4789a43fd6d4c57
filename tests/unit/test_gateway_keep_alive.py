# SPDX-License-Identifier: Apache-2.0
"""How long a model serves after its last request."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import eventually

from flashd.errors import InvalidArgument, NotFound
from flashd.gateway.keep_alive import FOREVER_S, KeepAlive, seconds


@pytest.mark.parametrize(
    ("value", "expected_s"),
    [
        *((0, 0), (5, 5), (0.5, 0.5), ("300", 300), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25)),
        *((-1, FOREVER_S), ("-1", FOREVER_S), ("-5m", FOREVER_S), ("+1m", 60), (1e300, FOREVER_S), ("0s", 0)),
    ],
)
def test_durations(value: object, expected_s: float) -> None:
    assert seconds(value) == pytest.approx(expected_s)


@given(st.none() | st.booleans() | st.text() | st.lists(st.integers()) | st.just(float("nan")))
def test_what_is_no_duration_is_refused(value: object) -> None:
    try:
        assert seconds(value) >= 0
    except InvalidArgument as error:
        assert "5m" in error.hint


async def test_the_last_request_decides() -> None:
    parked: list[str] = []
    busy = {"c"}

    def park(model: str) -> None:
        parked.append(model)
        if model == "b":
            raise NotFound("it does not serve")

    timers = KeepAlive(park, busy.__contains__)
    timers.ends("a", 0.01)
    timers.ends("a", None)  # a later request says nothing
    timers.ends("b", 0.01)
    timers.ends("c", 0.01)  # another of its requests is not answered yet
    timers.ends("d", FOREVER_S)
    timers.ends("e", 60)
    timers.ends("f", 60)
    timers.begins("f")
    timers.ends("f", 0)
    await eventually(lambda: set(parked) == {"b", "f"})
    await timers.close()
    await asyncio.sleep(0.05)
    assert sorted(parked) == ["b", "f"]
