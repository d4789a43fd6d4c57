# SPDX-License-Identifier: Apache-2.0
"""Problems that need a user are looked for outside the event loop, and read from what was found."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import eventually

from flashd.daemon.events import Events
from flashd.daemon.lifecycle.problems import Problems
from flashd.store.catalog import Catalog

LONG_S = 20.0


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "store") as opened:
        yield opened


async def test_what_is_set_aside_later_is_found_and_told(catalog: Catalog, tmp_path: Path) -> None:
    told: list[int] = []
    events = Events()
    events.problems_changed.subscribe(lambda: told.append(1))
    problems = Problems(catalog, tmp_path, events, look_s=0.01)
    assert problems.all(with_names=True) == []
    problems.start()
    (tmp_path / "dismissed.damaged").touch()
    await eventually(lambda: problems.all(with_names=True))
    assert "dismissed.damaged" in problems.all(with_names=True)[0][0]
    (tmp_path / "dismissed.damaged").unlink()
    await eventually(lambda: not problems.all(with_names=True))
    await eventually(lambda: len(told) == 2)
    await problems.close()


async def test_a_models_folder_that_is_missing_is_a_problem_while_it_is(catalog: Catalog, tmp_path: Path) -> None:
    missing = {tmp_path / "my models": "it does not exist"}
    problems = Problems(catalog, tmp_path, Events(), missing_folders=lambda: missing, look_s=0.01)
    problems.start()
    await eventually(lambda: problems.all(with_names=False))
    ((what, remedy),) = problems.all(with_names=False)
    assert what.startswith(f"{tmp_path}/my models: it does not exist") and f"mkdir -p '{tmp_path}/my models'" in remedy
    missing.clear()
    await eventually(lambda: not problems.all(with_names=False))
    await problems.close()


async def test_reading_looks_at_no_disk_and_waits_for_none_that_hangs(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = Problems(catalog, tmp_path, Events(), look_s=0.01)
    looking, answer = threading.Event(), threading.Event()

    def hangs() -> list[Path]:
        assert threading.current_thread() is not threading.main_thread(), "the event loop waits for the disk"
        looking.set()
        answer.wait(LONG_S)
        return []

    monkeypatch.setattr(catalog, "damaged", hangs)
    for _ in range(100):
        assert problems.all(with_names=True) == problems.all(with_names=False) == []
    problems.start()
    try:
        await eventually(looking.is_set)
        assert problems.all(with_names=True) == []
        await problems.close()
    finally:
        answer.set()
