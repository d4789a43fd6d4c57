# SPDX-License-Identifier: Apache-2.0
"""Pages of other sites that ask the gateway, in a real Chromium: those of permitted sites are answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from browser import CHROMIUM, browser
from conftest import SAYS, Daemon, Remote, import_model, running_daemon
from gateways import WHO, running_gateway
from running import CONFIG

from flashd.dbus.private_bus import PrivateBus

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")

_ASK = """
(async () => {
  const asked = {method: "POST", headers: {"content-type": "application/json", "authorization": "Bearer none"},
                 body: JSON.stringify(BODY)};
  try { return await (await fetch(URL + "/v1/chat/completions", asked)).text(); }
  catch (error) { return String(error); }
})()
"""


class _Site(BaseHTTPRequestHandler):
    """An empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def sites() -> Iterator[tuple[str, str]]:
    """The addresses of two web sites."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Site) for _ in range(2)]
    for server in servers:
        Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
    mine, others = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    yield mine, others
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def daemon(bus: PrivateBus, sites: tuple[str, str], tmp_path: Path, short_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(bus.address, tmp_path, short_path)
    daemon.config.write_text(f"{CONFIG}[gateway]\norigins = ['{sites[0]}']\n")
    with running_daemon(daemon) as running:
        yield running


async def test_the_pages_of_a_permitted_site_read_answers_and_no_others(
    daemon: Daemon, remote: Remote, sites: tuple[str, str], sources: Path, tmp_path: Path, short_path: Path
) -> None:
    await import_model(remote, sources / "ada", "ada")
    async with (
        running_gateway(daemon, tmp_path / "gateway.log", short_path / "gateway.sock") as gateway,
        browser(tmp_path / "browser") as page,
    ):

        async def said(site: str, **body: object) -> str:
            await page.tell("Page.navigate", url=site)
            await page.until(f"location.origin === {json.dumps(site)}")
            full = {"messages": WHO, "temperature": 0, "max_tokens": 40, **body}
            return str(await page.run(_ASK.replace("BODY", json.dumps(full)).replace("URL", json.dumps(gateway.url))))

        mine, others = sites
        assert json.loads(await said(mine, model="ada"))["choices"][0]["message"]["content"] == SAYS["ada"]
        assert (await said(mine, model="ada", stream=True)).endswith("data: [DONE]\n\n")
        assert "there is no model 'eve'" in await said(mine, model="eve"), "it reads refusals, too"
        assert await said(others, model="ada") == "TypeError: Failed to fetch"
