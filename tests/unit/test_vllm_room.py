# SPDX-License-Identifier: Apache-2.0
"""The memory that a vLLM started by hand takes beside others: the arithmetic, without vLLM."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from flashd.units import GiB
from flashd.workers.vllm import room


@dataclass
class CacheConfig:
    """As vLLM's."""

    gpu_memory_utilization: float = 0.92


def fitted(monkeypatch: pytest.MonkeyPatch, *line: str, free: int, held: int = 0, told: float = 0.92) -> float:
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "model", *line])
    config = CacheConfig(told)
    room.fit(config, free * GiB, 80 * GiB, held_bytes=held * GiB)
    return config.gpu_memory_utilization


def test_it_stays_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(monkeypatch, free=76) == 0.92


@pytest.mark.parametrize(("free", "held"), [(60, 0), (20, 0), (50, 20), (2, 70)])
def test_it_is_what_is_free_where_there_is_less(
    monkeypatch: pytest.MonkeyPatch, free: int, held: int, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM wants its share, less the weights that are there already, to be free."""
    with caplog.at_level(logging.WARNING):
        chosen = fitted(monkeypatch, free=free, held=held)
    assert 0 < chosen * 80 - held <= free and chosen > (free + held) / 80 - 0.025
    assert f"{chosen:.2f} instead of 0.92" in caplog.text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ((), 0.9),
        (("--gpu-memory-utilization", "0.92"), 0.92),
        (("--gpu-memory-utilization=0.92",), 0.92),
        (("--gpu_memory_utilization", "0.92"), 0.92),
    ],
)
def test_what_somebody_chose_stays_and_the_number_that_would_fit_is_said(
    monkeypatch: pytest.MonkeyPatch, line: tuple[str, ...], told: float, caplog: pytest.LogCaptureFixture
) -> None:
    assert fitted(monkeypatch, *line, free=60, told=told) == told
    assert "--gpu-memory-utilization 0.74 would fit" in caplog.text


def test_nothing_is_promised_where_nothing_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(monkeypatch, free=0) == 0.92
