# SPDX-License-Identifier: Apache-2.0
"""What visitors of the gateway's page may see and change, by where they come from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Daemon, Remote
from gateways import Gateway, running_gateway
from waiting import PATIENCE_S

from flashd.dbus import wire
from flashd.gateway.tokens import TokenFile

CHANGE = {"x-flashd-page": "1"}


@pytest.fixture
def daemon(shared: Daemon) -> Daemon:
    return shared


@pytest.fixture
async def gateway(daemon: Daemon, lasting: Remote, tmp_path: Path, short_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(daemon, tmp_path / "gateway.log", short_path / "gateway.sock") as running:
        yield running


@pytest.fixture
async def web(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """A visitor at the loopback address."""
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
async def own(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """A visitor by the Unix socket of the user whose daemon it is."""
    transport = httpx.AsyncHTTPTransport(uds=str(gateway.socket_path))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE_S) as client:
        yield client


async def do(client: httpx.AsyncClient, action: str, headers: dict[str, str] = CHANGE, **fields: Any) -> httpx.Response:
    return await client.post(f"/flashd/v1/actions/{action}", json=fields, headers=headers)


async def test_a_local_program_changes_nothing_that_requests_do_not(web: httpx.AsyncClient, lasting: Remote) -> None:
    assert (await do(web, "serve", model="ada")).json() == {}
    assert (await lasting.model("ada"))["Serving"]
    for action, fields in (
        ("swap", {"model": "bob"}), ("load", {"model": "bob"}), ("evict", {"model": "bob"}), ("pin", {"model": "bob"}),
        ("make-private", {"model": "bob"}), ("remove", {"model": "bob"}), ("pull", {"repository": "a/b"}),
        ("cancel", {"number": "1"}),
    ):  # fmt: skip
        refused = await do(web, action, **fields)
        assert refused.status_code == 403 and "gateway.change_models" in refused.json()["error"]["hint"], action
    assert not (await lasting.model("bob"))["Pinned"]
    assert "gateway.change_models" in (await web.get("/flashd/v1/state")).json()["rights"]["models"]
    assert (await do(web, "park", model="ada")).json() == {}
    assert not (await lasting.model("ada"))["Serving"]


async def test_at_the_socket_its_user_changes_everything(own: httpx.AsyncClient, lasting: Remote) -> None:
    assert (await own.get("/flashd/v1/state")).json()["rights"] == {"memory": "", "models": ""}
    assert (await do(own, "pin", model="bob")).json() == {}
    assert (await lasting.model("bob"))["Pinned"]
    assert (await do(own, "unpin", model="bob")).json() == {}
    number = (await do(own, "load", model="bob", tier="host")).json()["job"]
    assert (await lasting.finished(wire.job_path(number)))["State"] == "done"
    assert (await do(own, "evict", model="bob")).json() == {}
    assert (await lasting.model("bob"))["Residency"] == "stored"
    for action, fields, status in (
        ("load", {"model": "bob", "tier": "moon"}, 400), ("pin", {}, 400), ("pin", {"model": 7}, 400),
        ("pin", {"model": "nobody"}, 404), ("dance", {"model": "bob"}, 404), ("pull", {"repository": "../x"}, 400),
        ("cancel", {"number": "999999"}, 404),
    ):  # fmt: skip
        refused = await do(own, action, **fields)
        assert refused.status_code == status and refused.json()["error"]["message"], (action, refused.text)


async def test_pages_of_others_neither_read_nor_change(
    web: httpx.AsyncClient, own: httpx.AsyncClient, gateway: Gateway, lasting: Remote
) -> None:
    ours = {"Origin": gateway.url, "Sec-Fetch-Site": "same-origin"}
    assert (await do(web, "park", CHANGE | ours, model="ada")).status_code == 200
    assert "x-flashd-page" in (await do(own, "pin", {}, model="ada")).json()["error"]["message"]
    for client in (web, own):
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
            {"Origin": gateway.url, "Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Host": "evil.example:8434"},
            {"Host": "evil.example:8434", "Origin": "http://evil.example:8434", "Sec-Fetch-Site": "same-origin"},
        ):
            for path in ("/flashd/v1/state", "/flashd/v1/events", "/flashd/v1/settings", "/page/x/app.js"):
                assert (await client.get(path, headers=headers)).status_code == 403, (path, headers)
            assert (await do(client, "pin", CHANGE | headers, model="ada")).status_code == 403
        preflight = await client.options("/flashd/v1/actions/pin")
        assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers
    assert not (await lasting.model("ada"))["Pinned"]


async def test_private_models_and_their_jobs_show_at_the_socket_alone(
    web: httpx.AsyncClient, own: httpx.AsyncClient, lasting: Remote
) -> None:
    await do(own, "load", model="bob", tier="host")
    assert (await do(own, "make-private", model="bob")).json() == {}
    assert (await do(web, "serve", model="bob")).status_code == 404  # from the answer on
    assert "bob" not in (await web.get("/flashd/v1/state")).text
    shown = (await own.get("/flashd/v1/state")).json()
    assert shown["models"]["bob"]["private"] and "bob" in {job["subject"] for job in shown["jobs"].values()}
    for action in ("serve", "park"):
        assert (await do(web, action, model="bob")).status_code == 404
    assert (await web.get("/flashd/v1/would-displace?model=bob")).status_code == 404
    assert (await do(own, "make-public", model="bob")).json() == {}


async def test_a_token_uses_its_models_and_changes_none(web: httpx.AsyncClient, gateway: Gateway) -> None:
    bearer = {"Authorization": "Bearer " + TokenFile(gateway.tokens).new("laptop", ["bob"])}
    state = (await web.get("/flashd/v1/state", headers=bearer)).json()
    assert list(state["models"]) == ["bob"] and "token" in state["rights"]["memory"]
    assert not [job for job in state["jobs"].values() if job["subject"] != "bob"]
    assert (await do(web, "pin", CHANGE | bearer, model="bob")).status_code == 403
    assert (await do(web, "serve", CHANGE | bearer, model="ada")).status_code == 404
    assert (await do(web, "serve", CHANGE | bearer, model="bob")).json() == {}


async def test_a_token_that_was_made_for_it_changes_its_models(
    web: httpx.AsyncClient, gateway: Gateway, lasting: Remote
) -> None:
    bearer = CHANGE | {"Authorization": "Bearer " + TokenFile(gateway.tokens).new("phone", ["bob"], changes=True)}
    assert (await web.get("/flashd/v1/state", headers=bearer)).json()["rights"] == {"memory": "", "models": ""}
    assert (await do(web, "pin", bearer, model="bob")).json() == {}
    assert (await lasting.model("bob"))["Pinned"]
    assert (await do(web, "unpin", bearer, model="bob")).json() == {}
    assert (await do(web, "pin", bearer, model="ada")).status_code == 404
    assert (await do(web, "pull", bearer, repository="a/b")).status_code == 403


async def test_files_may_be_kept_and_the_page_is_asked_for_again(web: httpx.AsyncClient) -> None:
    browser = {"accept": "text/html,*/*"}
    page = await web.get("/", headers=browser)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["x-frame-options"] == "DENY" and page.headers["x-content-type-options"] == "nosniff"
    again = await web.get("/", headers=browser | {"if-none-match": page.headers["etag"]})
    assert again.status_code == 304
    (script,) = [part for part in page.text.split('"') if part.endswith("/app.js")]
    file = await web.get(script)
    assert file.headers["content-type"].startswith("text/javascript") and "immutable" in file.headers["cache-control"]
    for other in ("/page/0/app.js", script.replace("app.js", "..%2fsettings.py")):
        assert (await web.get(other)).status_code == 404
    assert (await web.get("/")).text == "Ollama is running"
