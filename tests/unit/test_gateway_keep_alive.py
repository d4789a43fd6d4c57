# SPDX-License-Identifier: Apache-2.0
"""How long a model serves after its last request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.errors import InvalidArgument, Unavailable
from flashd.gateway.keep_alive import FOREVER_S, KeepAlive, seconds


@pytest.mark.parametrize(
    ("value", "expected_s"),
    [
        *((0, 0), (5, 5), (0.5, 0.5), ("300", 300), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25)),
        *((10**400, FOREVER_S), (-(10**400), FOREVER_S), (float("inf"), FOREVER_S)),
        *((-1, FOREVER_S), ("-1", FOREVER_S), ("-5m", FOREVER_S), ("+1m", 60), (1e300, FOREVER_S), ("0s", 0)),
    ],
)
def test_durations(value: object, expected_s: float) -> None:
    assert seconds(value) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    "value", [None, True, float("nan"), [], "", "m", "5 m", "5x", "1m-1s", "٣", "0" * 81 + "5m", "1e5"]
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument) as refused:
        seconds(value)
    assert "5m" in refused.value.hint


@given(st.text() | st.integers() | st.floats())
def test_whatever_is_said_is_read_or_refused(value: object) -> None:
    try:
        assert seconds(value) >= 0
    except InvalidArgument:
        assert isinstance(value, str) or value != value


async def test_the_daemon_is_told_once_for_as_long_as_a_model_serves() -> None:
    told: list[tuple[str, float]] = []

    def tell(model: str, keep_s: float) -> None:
        told.append((model, keep_s))
        if model == "b":
            raise Unavailable("b does not serve")

    keep_alive = KeepAlive(tell)
    for model, keep_s in (("a", None), ("a", 300.0), ("a", 300.0), ("a", None), ("a", 0.0), ("b", 60.0)):
        keep_alive.asked(model, keep_s)
        await keep_alive.close()
    assert told == [("a", 300.0), ("a", 0.0), ("b", 60.0)]
    keep_alive.asked("b", 60.0)
    keep_alive.serving(["b"])
    keep_alive.asked("a", 0.0)
    await keep_alive.close()
    assert told[3:] == [("b", 60.0), ("a", 0.0)]
