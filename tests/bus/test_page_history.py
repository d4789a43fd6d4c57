# SPDX-License-Identifier: Apache-2.0
"""What the page remembers of requests and jobs when the gateway is started again."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Daemon, Remote
from gateways import running_gateway
from waiting import PATIENCE_S, eventually

from flashd.gateway.page.history import History
from flashd.gateway.page.schema import RequestState

QUESTION = {"model": "ada", "messages": [{"role": "user", "content": "Who is asked?"}], "max_tokens": 4}


@pytest.fixture
async def start(shared: Daemon, lasting: Remote, tmp_path: Path, short_path: Path) -> AsyncIterator[Any]:
    """Runs a gateway with this history, for the length of a context."""

    def started(history: Path) -> Any:
        options = ["--history", str(history)]
        return running_gateway(shared, tmp_path / "gateway.log", short_path / "gateway.sock", options=options)

    yield started


async def state(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as web:
        found: dict[str, Any] = (await web.get("/flashd/v1/state")).json()
        return found


async def ask(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as web:
        assert (await web.post("/v1/chat/completions", json=QUESTION)).status_code == 200


async def test_requests_and_jobs_are_there_after_a_restart_but_not_what_was_asked(start: Any, tmp_path: Path) -> None:
    history = tmp_path / "history.sqlite"
    async with start(history) as gateway:
        await ask(gateway.url)
        await eventually(lambda: state_has(gateway.url, "requests", "ada"))
        before = await state(gateway.url)
    assert history.stat().st_mode & 0o777 == 0o600
    assert b"Who is asked" not in history.read_bytes()
    async with start(history) as gateway:
        await eventually(lambda: state_has(gateway.url, "requests", "ada"))
        after = await state(gateway.url)
        assert list(after["requests"].values()) == list(before["requests"].values())
        serves = [job for job in before["jobs"].values() if job["kind"] == "serve" and job["subject"] == "ada"]
        assert serves and all(job in after["jobs"].values() for job in serves)
        await ask(gateway.url)
        await eventually(lambda: state_has(gateway.url, "requests", "ada", 2))


async def test_a_file_that_is_damaged_begins_anew(start: Any, tmp_path: Path, shared: Daemon) -> None:
    history = tmp_path / "history.sqlite"
    history.write_bytes(b"no database at all" * 100)
    with pytest.raises(AssertionError, match="begins anew"):  # the gateway's log is read at its end
        async with start(history) as gateway:
            await ask(gateway.url)
            await eventually(lambda: state_has(gateway.url, "requests", "ada"))
    with sqlite3.connect(history) as file:
        assert file.execute("SELECT count(*) FROM ended").fetchone()[0] > 0


def entry(number: int) -> RequestState:
    return RequestState("ada", "/v1/chat/completions", number, 0.0, 0.1, 0.2, 200, "", 3, 4)


def test_only_the_last_are_kept_and_nothing_if_the_settings_say_so(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history.sqlite"
    history = History(path, lambda: 3)
    for number in range(5):
        history.add(entry(number))
    history.close()
    assert [each["arrived_at"] for each in History(path, lambda: 3).requests()] == [2, 3, 4]
    off = History(path, lambda: 0)
    assert off.requests() == []
    off.add(entry(9))
    off.close()
    assert not path.exists()


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "history.sqlite", lambda: 3)
    for number in range(3):
        history.add(entry(number))
    history.close()
    assert "is not written any more" in caplog.text


@pytest.mark.parametrize("why", ["locked", "a link"])
def test_a_file_that_cannot_be_read_now_stays(why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, link = tmp_path / "history.sqlite", tmp_path / "link"
    history = History(path, lambda: 9)
    history.add(entry(1))
    history.close()
    link.symlink_to(path)
    with contextlib.closing(sqlite3.connect(path)) as other:
        if why == "locked":
            other.execute("BEGIN EXCLUSIVE")
        assert History(path if why == "locked" else link, lambda: 9).requests() == []
    assert "cannot be read" in caplog.text
    assert [each["arrived_at"] for each in History(path, lambda: 9).requests()] == [1]


def test_entries_of_another_version_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    history = History(path, lambda: 9)
    history.add(entry(1))
    history.close()
    with sqlite3.connect(path) as file:
        for text in ("{}", "[]", "no json", '{"model": "ada", "moon": 1}'):
            file.execute("INSERT INTO ended (kind, entry) VALUES ('RequestState', ?)", (text,))
    assert [each["arrived_at"] for each in History(path, lambda: 9).requests()] == [1]


async def state_has(url: str, what: str, model: str, count: int = 1) -> bool:
    found = (await state(url))[what].values()
    return sum(each["model"] == model for each in found) >= count
