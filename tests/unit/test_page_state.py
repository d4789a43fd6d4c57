# SPDX-License-Identifier: Apache-2.0
"""The state that the gateway's page is drawn from: tiers, merge patches, settings, and who gets what."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_alone import connect
from hypothesis import given
from hypothesis import strategies as st

from flashd.client.results import Device, Engine, Event, Model, Status
from flashd.client.tiers import Part, Tier, tiers
from flashd.config.settings import GatewayConfig
from flashd.dbus import wire
from flashd.gateway.access import ACCESS, Access
from flashd.gateway.directory import Directory
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.guard import Guard
from flashd.gateway.metrics.daemon_news import DaemonNews
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.page.feed import Feed
from flashd.gateway.page.schema import model_state, patch
from flashd.gateway.page.settings import shown
from flashd.gateway.tokens import TokenFile

GB = 10**9
STATUS = Status("1", "ready", "", "", (), "/s", 100 * GB, 0, 900 * GB, ())


def model(name: str, gigabytes: int, *devices: str, **more: Any) -> Model:
    return Model(
        name, (), "c", "A", "BF16", gigabytes * GB, 1, "host", devices, False, False, 0, 0, 0, 0, "", "/m", **more
    )


def device(name: str, kind: str, *, used: int, driver: int = 0, total: int = 80) -> Device:
    sizes = (total * GB, (total - 8) * GB, used * GB, 0, driver * GB)
    return Device(name, kind, "", "", *sizes, "none", False, False, False, False, "/d")


def engine(name: str, state: str, host: int, gpu: int, cache: int) -> Engine:
    return Engine("vllm", state, name, "A", "", 1, 0, host * GB, gpu * GB, "image", 0, "/e", cache * GB)


def sizes(tier: Tier) -> dict[tuple[str, str], int]:
    return {(part.kind, part.model): part.size_bytes // GB for part in tier.parts}


def test_a_gpu_has_weights_caches_and_what_engines_take_besides() -> None:
    known = [model("a", 16, "cuda:0", "host", serving=True), model("b", 6, "cuda:0"), model("c", 9)]
    engines = [engine("a", "serving", 2, 30, 10), engine("c", "parked", 1, 1, 0)]
    devices = [device("cuda:0", "cuda", used=22, driver=38), device("host", "host", used=16, driver=30)]
    gpu, host, store = tiers(known, engines, devices, STATUS)
    # 30 GB of the engine that serves are 16 of weights, 10 of its cache and 4 of its own.
    assert sizes(gpu) == {
        ("weights", "a"): 16, ("weights", "b"): 6, ("cache", "a"): 10, ("engine", "a"): 4, ("engine", "c"): 1,
        ("others", ""): 1,
    }  # fmt: skip
    assert [part.held for part in gpu.parts if part.kind == "weights"] == ["serving", ""]
    assert sizes(host) == {("weights", "a"): 16, ("engine", "a"): 2, ("engine", "c"): 1, ("others", ""): 11}
    assert sizes(store) == {("weights", "a"): 16, ("weights", "c"): 9, ("weights", "b"): 6, ("more", ""): 69}


def test_memory_of_a_gpu_that_is_the_hosts_is_one_tier() -> None:
    devices = [device("cuda:0", "unified", used=10, driver=14), device("host", "host", used=10, driver=14)]
    gpu, store = tiers(
        [model("a", 10, "cuda:0", "host", serving=True)], [engine("a", "serving", 2, 0, 1)], devices, STATUS
    )
    assert gpu.is_shared and store.kind == "store"
    assert sizes(gpu) == {("weights", "a"): 10, ("cache", "a"): 1, ("engine", "a"): 2, ("others", ""): 1}


def test_a_simulated_gpu_is_a_piece_of_the_host_and_holds_models_alone() -> None:
    devices = [device("sim:0", "simulated", used=10, driver=300), device("host", "host", used=0, driver=300, total=400)]
    gpu, host = tiers([model("a", 10, "sim:0", serving=True)], [engine("a", "serving", 2, 0, 0)], devices, None)
    assert sizes(gpu) == {("weights", "a"): 10}
    assert sizes(host) == {("engine", "a"): 2, ("others", ""): 298}


def test_models_that_are_not_shown_count_as_more_and_small_ones_as_one() -> None:
    (host,) = tiers([model("a", 4, "host")], [], [device("host", "host", used=10)], None)
    assert sizes(host) == {("weights", "a"): 4, ("more", ""): 6}
    many = [model(f"m{n:03d}", 1 + n % 3, "host") for n in range(200)]
    (host,) = tiers(many, [], [device("host", "host", used=400)], None)
    assert len(host.parts) < 70 and sum(part.count for part in host.parts if part.kind == "weights") == 200
    assert sum(part.size_bytes for part in host.parts) >= sum(each.size_bytes for each in many)
    assert host.parts[60] == Part("weights", host.parts[60].size_bytes, count=140)


Json = st.recursive(
    st.integers() | st.text(max_size=3) | st.booleans() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
Objects = st.dictionaries(st.text(max_size=2), Json, max_size=4)


@given(Objects, Objects)
def test_a_patch_makes_the_new_of_the_old(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert merged(before, patch(before, after)) == after
    assert patch(after, json.loads(json.dumps(after))) == {}


def merged(value: Any, said: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(said, Mapping):
        return said
    found = dict(value) if isinstance(value, Mapping) else {}
    for name, part in said.items():
        if part is None:
            found.pop(name, None)
        else:
            found[name] = merged(found.get(name), part)
    return found


CONFIG = """
[engines]
default = "vllm"
[engines.vllm]
environment = ["HF_TOKEN=secret"]
arguments = ["--api-key", "secret"]
[store]
path = "/home/me/store"
[models."a/b"]
engine = "torch"
[models.hidden]
engine = "torch"
"""


def test_settings_keep_secrets_and_hidden_models() -> None:
    public = {each.key: each for each in shown(CONFIG, ["a/b"], shows_all=False)}
    assert public["engines.default"].value == "vllm" and public["engines.default"].default == "auto"
    assert public["models.a/b.engine"].value == "torch"
    assert not [key for key in public if "hidden" in key]
    said = json.dumps([(each.value, each.command) for each in public.values()])
    assert "secret" not in said and "/home/me" not in said
    own = {each.key: each for each in shown(CONFIG, ["a/b"], shows_all=True)}
    assert "HF_TOKEN=secret" in own["engines.vllm.environment"].value
    assert own["store.path"].command == "flash config store.path /home/me/store"


@contextlib.asynccontextmanager
async def elsewhere(tokens: TokenFile) -> AsyncIterator[httpx.AsyncClient]:
    """A client on another machine, of a gateway whose application says the path that was let in."""

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    async def from_afar(scope: Any, receive: Any, send: Any) -> None:
        await Guard(inside, tokens)({**scope, "server": ("192.0.2.7", 8434)}, receive, send)

    transport = httpx.ASGITransport(app=from_afar)
    async with httpx.AsyncClient(transport=transport, base_url="http://192.0.2.7:8434") as client:
        yield client


async def test_other_machines_get_the_page_and_nothing_else_without_a_token(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.toml")
    bearer = {"Authorization": f"Bearer {tokens.new('laptop')}"}
    async with elsewhere(tokens) as client:
        for path in ("/", "/page/0123/app.js"):
            assert (await client.get(path)).text == path
            assert (await client.get(path, headers={"Authorization": "Bearer flashd-wrong"})).status_code == 401
        for path in (
            "/flashd/v1/state",
            "/flashd/v1/events",
            "/flashd/v1/actions/pin",
            "/v1/models",
            "/page",
            "/health",
        ):
            assert (await client.get(path)).status_code == 401, path
            assert (await client.get(path, headers=bearer)).text == path


async def test_sites_that_may_use_models_do_not_get_the_page_s_interface(tmp_path: Path) -> None:
    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    settings = GatewayConfig(origins=("https://chat.example",), change_models=True)
    for is_ours in (False, True):
        guard = Guard(inside, TokenFile(tmp_path / "tokens.toml"), lambda: settings, socket_is_ours=is_ours)
        transport = httpx.ASGITransport(app=guard, client=("127.0.0.1", 1))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8434") as client:
            for site, path, status in (
                ("https://chat.example", "/v1/models", 200),
                ("https://chat.example", "/flashd/v1/state", 403),
                ("https://chat.example", "/flashd/v1/actions/pin", 403),
                ("http://127.0.0.1:8434", "/flashd/v1/actions/pin", 200),
            ):
                headers = {"Origin": site, "X-Flashd-Page": "1"}
                assert (await client.post(path, headers=headers)).status_code == status, (site, path)


@pytest.mark.parametrize("change", [{"private": True}, {"serving": True}])
def test_a_model_that_changes_is_all_that_a_patch_has(change: dict[str, bool]) -> None:
    known = {name: model_state(model(name, 1), "", 0, 0) for name in ("a", "b")}
    after = {**known, "b": model_state(replace(model("b", 1), **change), "", 0, 0)}
    assert patch(known, after) == {"b": change}


async def test_jobs_show_to_those_who_may_know_of_their_models() -> None:
    measures = Measures()
    dispatcher = Dispatcher(connect, measures, DaemonNews(measures))
    feed = Feed(dispatcher, DaemonNews(measures), "")
    models = {"open": model("open", 1), "secret": model("secret", 1, private=True)}
    dispatcher._note(Directory(models=models, is_connected=True, is_settled=True))
    jobs = (
        ("pull", "secret", "running"), ("pull", "new/one", "running"), ("pull", "gone/one", "done"),
        ("serve", "secret", "done"), ("serve", "open", "done"), ("import", "coming", "running"),
        ("scrub", "", "running"),
    )  # fmt: skip
    for number, (kind, subject, state) in enumerate(jobs):
        ended = 0.0 if state == "running" else 2.0
        said = {"Kind": kind, "Subject": subject, "State": state, "CreatedAt": 1.0, "FinishedAt": ended}
        feed.jobs.happened(Event("added", wire.job_path(number), wire.JOB, said))
    await asyncio.sleep(0)  # the news come by another thread

    def shown(access: Access) -> set[str]:
        ACCESS.set(access)
        return {f"{job['kind']} {job['subject']}" for job in feed.state()["jobs"].values()}

    assert shown(Access(sees_private=False)) == {"pull new/one", "serve open", "scrub "}
    assert shown(Access(sees_private=False, models=("open",))) == {"serve open"}
    assert len(shown(Access())) == len(jobs)


async def test_a_request_shows_from_when_it_waits() -> None:
    measures = Measures()
    dispatcher = Dispatcher(connect, measures, DaemonNews(measures))
    feed = Feed(dispatcher, DaemonNews(measures), "")
    engine = Engine("torch", "serving", "open", "A", "", 1, 0, 0, 0, "", 0, "/e")
    known = {"open": model("open", 1, "host", serving=True)}
    dispatcher._note(Directory(models=known, engines={"/e": engine}, is_connected=True, is_settled=True))
    changes = feed.changes()
    assert (await anext(changes) or {})["models"]["open"]["answering"] == 0
    async with dispatcher._turn("open", 0.0):
        assert await anext(changes) == {"models": {"open": {"answering": 1}}}
    assert await anext(changes) == {"models": {"open": {"answering": 0}}}
    feed.close()
    assert [each async for each in changes] == []
    await dispatcher.close()
