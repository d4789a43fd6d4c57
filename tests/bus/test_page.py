# SPDX-License-Identifier: Apache-2.0
"""The gateway's page in a real Chromium, with a real daemon and engines; all tests of the module share one of each."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from browser import CHROMIUM, Page, browser
from conftest import Daemon, Remote, lasting_daemon, remote_of
from gateways import Gateway, running_gateway
from running import CONFIG

from flashd.dbus import wire

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium"),
]
CHANGE = {"x-flashd-page": "1"}


@pytest.fixture(scope="module")
def daemon(sources: Path) -> Iterator[Daemon]:
    with lasting_daemon(
        *(sources / name for name in ("ada", "bob", "carl")), config=CONFIG + "[gateway]\nchange_models = true\n"
    ) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with running_gateway(
        daemon, tmp_path_factory.mktemp("gateway") / "gateway.log", daemon.runtime / "gateway.sock"
    ) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def page(tab: Page, gateway: Gateway) -> AsyncIterator[Page]:
    """The page, which must not complain, nor ask another host."""
    await tab.looks(1280)
    await tab.go("about:blank") if False else None
    yield tab
    assert tab.faults == []
    assert tab.hosts <= {f"127.0.0.1:{gateway.port}"}


@pytest_asyncio.fixture(loop_scope="module")
async def remote(daemon: Daemon) -> AsyncIterator[Remote]:
    async with remote_of(daemon) as made:
        yield made
        await made.settle("ada", "bob", "carl")


def shows(text: str, selector: str = "main") -> str:
    """An expression: the page shows a text."""
    return f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})"


async def test_a_model_is_switched_to_from_the_page(page: Page, gateway: Gateway, remote: Remote) -> None:
    await page.go(gateway.url + "/#memory")
    await page.until(shows("No model serves"))
    await page.type("#switch-to", "bob")
    await page.until(shows("There is room for bob"))
    await page.press("Enter")
    await page.until("document.querySelector('.now .name')?.textContent === 'bob'")
    await page.until(shows("bob serves, after", ".notes"))
    assert (await remote.model("bob"))["Serving"]
    await page.click(".now button")
    await page.until(shows("No model serves"))


async def test_what_others_do_shows_without_a_question(page: Page, gateway: Gateway, remote: Remote) -> None:
    await page.go(gateway.url + "/#models")
    await page.until("document.querySelectorAll('tbody tr').length === 3")
    await remote.call("Pin", path=wire.model_path("carl"), interface=wire.MODEL)
    await page.until("document.querySelector('tr[data-model=carl] .tag[title=pinned]')")
    await remote.call("Unpin", path=wire.model_path("carl"), interface=wire.MODEL)
    await page.until("!document.querySelector('tr[data-model=carl] .tag[title=pinned]')")
