# SPDX-License-Identifier: Apache-2.0
"""The gateway's page in a real Chromium, with a real daemon and engines. All tests share one of each, and end as they
began."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from browser import CHROMIUM, Page, browser
from conftest import SAYS, Daemon, Remote, import_model, lasting_daemon, make_source, remote_of
from gateways import Gateway, running_gateway
from made_up_machine import MadeUp, made_up_machine
from running import CONFIG
from waiting import eventually

from flashd.dbus import wire
from flashd.gateway.tokens import TokenFile

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium"),
]
VIEWS = ("memory", "models", "activity", "chat", "settings")
HOSTILE = (
    "<img src=x onerror=document.title='taken'>",
    "__proto__",
    "constructor",
    "a\"b'c`${1}",
    "</script><b>bold",
    "\u202eevil",
)


@pytest.fixture(scope="module")
def daemon(sources: Path) -> Iterator[Daemon]:
    config = CONFIG + "[gateway]\nchange_models = true\n"
    with lasting_daemon(*(sources / name for name in ("ada", "bob", "carl")), config=config) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    async with running_gateway(daemon, log, daemon.runtime / "gateway.sock") as running:
        yield running


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return TokenFile(tmp_path_factory.mktemp("made-up") / "tokens.toml")


@pytest.fixture(scope="module")
def made_up(tokens: TokenFile) -> Iterator[MadeUp]:
    """A gateway that knows of a large machine, without a daemon."""
    with made_up_machine(tokens, more=1000) as machine:
        yield machine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def page(tab: Page) -> AsyncIterator[Page]:
    """A tab in which the page must not complain, breach its content policy, or ask another host."""
    await tab.looks(1280)
    yield tab
    assert tab.faults == []
    assert {host.partition(":")[0] for host in tab.hosts} <= {"127.0.0.1"}
    await tab.tell("Page.navigate", url="about:blank")


@pytest_asyncio.fixture(loop_scope="module")
async def remote(daemon: Daemon) -> AsyncIterator[Remote]:
    async with remote_of(daemon) as made:
        yield made
        await made.settle("ada", "bob", "carl")


def has(text: str, selector: str = "main") -> str:
    """An expression: the page shows a text."""
    return f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})"


def row(model: str) -> str:
    """A selector of the row of a model."""
    return f"tr[data-model={json.dumps(model)}]"


async def choose(page: Page, model: str, word: str) -> None:
    """Chooses from the menu of a model, which offers what suits the model as the page knows it when it is opened."""
    opened = f"(document.querySelector({json.dumps(row(model) + ' [aria-haspopup=menu]')})?.click(), document)"
    item = f"[...{{}}.querySelectorAll('.menu [role=menuitem]')].find(each => each.textContent === {json.dumps(word)})"
    await page.until(item.format(opened))
    await page.run(item.format("document") + ".click()")


async def test_a_model_is_switched_to_from_the_page(page: Page, gateway: Gateway, remote: Remote) -> None:
    await page.go(gateway.url + "/#memory")
    await page.until(has("No model serves"))
    await page.type("#switch-to", "bob")
    await page.until(has("There is room for bob"))
    await page.press("Enter")
    await page.until("document.querySelector('.now .name')?.textContent === 'bob'")
    await page.until(has("bob serves, after", ".notes"))
    assert (await remote.model("bob"))["Serving"]
    await page.type("#switch-to", "ada")
    await page.until(has("For ada, these would make way: bob"))  # they share an engine
    await page.click(".now button")
    await page.until(has("No model serves"))


async def test_what_others_do_shows_by_itself(page: Page, gateway: Gateway, remote: Remote) -> None:
    await page.go(gateway.url + "/#models")
    await page.until("document.querySelectorAll('tbody tr').length === 3")
    carl = wire.model_path("carl")
    await remote.call("Pin", path=carl, interface=wire.MODEL)
    await page.until(f"document.querySelector('{row('carl')} .tag[title=pinned]')")
    await remote.call("Unpin", path=carl, interface=wire.MODEL)
    await page.until(f"!document.querySelector('{row('carl')} .tag[title=pinned]')")


async def test_every_action_of_a_model(page: Page, gateway: Gateway, remote: Remote, tmp_path: Path) -> None:
    await import_model(remote, make_source(tmp_path / "dora"), "dora")
    await page.go(gateway.url + "/#models")
    for word, name, value in (
        ("Pin", "Pinned", True), ("Unpin", "Pinned", False),
        ("Load into host memory", "Residency", "host"), ("Evict from memory", "Residency", "stored"),
    ):  # fmt: skip
        await choose(page, "dora", word)
        await page.until(has(f"{word}: dora", ".notes"))
        await until_is(remote, "dora", name, value)
    await choose(page, "dora", "Remove …")
    await page.click("dialog [value=no]")
    assert (await remote.model("dora"))["Name"] == "dora"
    await choose(page, "dora", "Remove …")
    await page.click("dialog [value=yes]")
    await page.until(f"!document.querySelector('{row('dora')}')")
    assert wire.model_path("dora") not in await remote.objects()
    await choose(page, "carl", "Make it the active model")
    await page.until(f"document.querySelector('{row('carl')}').innerText.includes('active')")
    await choose(page, "bob", "Make private")
    await page.until(f"!document.querySelector('{row('bob')}')")  # this visitor may not see it any more
    await until_is(remote, "bob", "Private", True)


async def until_is(remote: Remote, model: str, name: str, value: Any) -> None:
    async def is_so() -> bool:
        return bool((await remote.model(model))[name] == value)

    await eventually(is_so)


async def test_by_a_forwarded_port_the_user_sees_private_models(page: Page, gateway: Gateway, remote: Remote) -> None:
    """As `ssh -L PORT:SOCKET` forwards it."""
    async with forwarded(gateway.socket_path) as url:
        await page.go(url + "/#models")
        await choose(page, "bob", "Make private")
        await page.until(f"document.querySelector('{row('bob')} .tag[title=private]')")
        await choose(page, "bob", "Make public")
        await page.until(f"!document.querySelector('{row('bob')} .tag[title=private]')")
        assert not (await remote.model("bob"))["Private"]


@asynccontextmanager
async def forwarded(path: Path) -> AsyncIterator[str]:
    """The address of a port whose connections lead to a Unix socket."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(65536):
            writer.write(said)
            await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside, outside = await asyncio.open_unix_connection(path)
        with suppress(ConnectionError):
            await asyncio.gather(pump(reader, outside), pump(inside, writer))

    async with await asyncio.start_server(connected, "127.0.0.1") as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_two_models_answer_side_by_side(page: Page, gateway: Gateway, remote: Remote) -> None:
    await page.go(gateway.url + "/#chat")
    await page.until("document.querySelector('#chat-model-0')?.value")
    await page.run("[...document.querySelectorAll('button')].find(each => each.textContent === 'Compare two').click()")
    await page.type("#chat-model-0", "ada")
    await page.type("#chat-model-1", "bob")
    await page.run("document.querySelector('details').open = true")
    await page.type("#p-temperature", "0")
    await page.type("#p-max_tokens", "40")
    await page.type("#question", "Who are you?")
    await page.press("Enter")
    await page.until(
        "[...document.querySelectorAll('.facts')].filter(each => /tokens/.test(each.textContent)).length === 2"
    )
    assert await page.text(".side:nth-child(1) .answer > .text") == SAYS["ada"]
    assert await page.text(".side:nth-child(2) .answer > .text") == SAYS["bob"]
    facts = await page.run("[...document.querySelectorAll('.facts')].map(each => each.textContent).join()")
    assert "swap" in facts and "(start)" in facts and "first token after" in facts
    await page.type("#chat-model-0", "constructor")
    await page.run("document.querySelector('.chat .is-plain').click()")
    await page.type("#question", "Who?")
    await page.press("Enter")
    await page.until(has("there is no model 'constructor'"))
    await page.go(gateway.url + "/#activity")
    await page.until("document.querySelectorAll('tr[data-kind=requests]').length >= 2")
    await page.until("document.querySelectorAll('tr[data-kind=swaps] .stack i').length > 1")
    await page.until("document.querySelectorAll('.lane').length >= 2")


async def test_a_swap_that_fails_says_why_and_what_went_on(
    page: Page, gateway: Gateway, remote: Remote, tmp_path: Path
) -> None:
    await import_model(remote, make_source(tmp_path / "eve"), "eve")
    (job,) = await remote.call("Serve", "sa{sv}", "ada", {})
    await remote.finished(job)
    await page.go(gateway.url + "/#models")
    await page.click(f"{row('eve')} .acts .button")
    await page.until("document.querySelector('.note.is-bad')?.innerText.includes('eve')")
    assert (await remote.model("ada"))["Serving"]
    await page.run("location.hash = 'activity'")
    await page.until("document.querySelector('tr[data-kind=swaps] .tag.is-bad')")
    text = await page.text("tr[data-kind=swaps]:has(.is-bad)")
    assert "eve" in text and "TinyForNothing" in text and "What served before went on serving." in text


async def test_a_job_shows_its_progress_and_is_cancelled(
    page: Page, gateway: Gateway, remote: Remote, tmp_path: Path
) -> None:
    source = make_source(tmp_path / "carl") / "config.json"
    await page.go(gateway.url + "/#activity")
    with source.open() as opened:
        (job,) = await remote.call(
            "Import", "sa{sh}ba{sv}", "carl", {"config.json": 0}, True, {}, fds=[opened.fileno()]
        )
    await page.until(has("import carl"))
    await page.click("main .job button")
    assert (await remote.finished(job))["State"] == "cancelled"
    await page.until("!document.querySelector('main .job')")


async def test_a_daemon_that_is_killed_and_comes_back(
    page: Page, gateway: Gateway, daemon: Daemon, remote: Remote
) -> None:
    await page.go(gateway.url + "/#models")
    await page.until("document.querySelectorAll('tbody tr').length === 3")
    daemon.stop(signal.SIGKILL)
    await page.until(has("flashd does not run"))
    assert await page.run("document.querySelectorAll('tbody tr').length") == 3
    await page.click(f"{row('ada')} .acts .button")
    await page.until("document.querySelector('.note.is-bad')")
    daemon.start()
    await page.until("!document.querySelector('.banner')")
    async with remote_of(daemon) as again:
        await again.call("Pin", path=wire.model_path("ada"), interface=wire.MODEL)
        await page.until(f"document.querySelector('{row('ada')} .tag[title=pinned]')")
        await again.call("Unpin", path=wire.model_path("ada"), interface=wire.MODEL)


async def test_a_thousand_models_are_filtered(page: Page, made_up: MadeUp) -> None:
    await page.go(made_up.url + "/#models")
    await page.until("document.querySelectorAll('tbody tr').length >= 100")
    assert await page.run("document.querySelectorAll('tbody tr').length") < 300, "what is out of sight is not made"
    await page.type("main [type=search]", "customer-0777")
    await page.until("document.querySelectorAll('tbody tr').length === 1")
    assert "1 of 1,014 models" in await page.text()
    await page.type("main [type=search]", "whisper")
    await page.until(f"document.querySelector('{row('whisper-large-v3')}')")
    await page.click(".choices [data-kind=serving]")
    await page.until(has("No model fits the filter."))


async def test_bars_are_to_scale_and_read_by_keyboard(page: Page, made_up: MadeUp) -> None:
    await page.go(made_up.url + "/#memory")
    await page.until("document.querySelector('.bar button')")
    widths = await page.run(
        "(() => { const bar = document.querySelector('.bar'); return [...bar.querySelectorAll('button')]"
        ".map(each => [each.getAttribute('aria-label'), each.getBoundingClientRect().width / bar.clientWidth]) })()"
    )
    found = dict(widths)
    assert found["Qwen/Qwen3-8B, serving, 16.4 GB"] == pytest.approx(16.4 / 85, abs=0.002)
    assert found["Qwen/Qwen3-8B, KV caches, 8.6 GB"] == pytest.approx(8.6 / 85, abs=0.002)
    assert found["support-en, engines: context, code, graphs, 1.5 GB"] == pytest.approx(1.5 / 85, abs=0.002)
    await page.run("document.querySelector('.bar button').focus()")
    await page.press("ArrowRight")
    await page.until("document.querySelector('.has-part .detail')?.innerText.includes('sql-writer')")
    await page.run("document.querySelector('.bar [data-focus^=\"weights code-review\"]').focus()")
    await page.until(has("For code-review, these would make way: sql-writer, Qwen/Qwen3-8B"))
    marked = "[...document.querySelectorAll('.bar .makes-way')].map(each => each.dataset.focus).join()"
    await page.until(f"{marked}.includes('weights Qwen/Qwen3-8B serving,weights sql-writer serving')")
    await page.run("location.hash = 'models'")
    await page.run("document.querySelector('tbody [aria-haspopup=menu]').focus()")
    await page.press("Enter")
    await page.until("document.activeElement.getAttribute('role') === 'menuitem'")
    await page.press("Escape")
    await page.until("document.activeElement.getAttribute('aria-haspopup') === 'menu'")


async def test_hostile_names_do_nothing(page: Page, made_up: MadeUp) -> None:
    before = made_up.directory
    model = before.models["notes"]
    hostile = {name: replace(model, name=name, architecture=name, serving=True) for name in HOSTILE}
    made_up.know(replace(before, models={**before.models, **hostile}))
    said = {
        "Kind": HOSTILE[0],
        "Subject": HOSTILE[0],
        "State": "failed",
        "Phase": HOSTILE[4],
        "CreatedAt": time.time() - 1,
    }
    said |= {"DoneBytes": 0, "TotalBytes": 0, "FinishedAt": time.time(), "Error": (HOSTILE[0], HOSTILE[0], HOSTILE[4])}
    made_up.happens("added", wire.job_path(900), wire.JOB, said)
    await page.go(made_up.url + "/#memory")
    try:
        for view in VIEWS[:4]:
            await page.run(f"location.hash = '{view}'")
            await page.until(f"document.querySelector('.views [aria-current]').hash === '#{view}'")
            assert await page.run("document.querySelectorAll('img[src=x], main b, main script').length") == 0
        await page.run("location.hash = 'models'")
        await page.click(".choices [data-kind=serving]")
        await page.until(f"document.querySelectorAll('tbody tr').length === {len(HOSTILE) + 2}")
        for name in HOSTILE:
            assert await page.run(
                f"[...document.querySelectorAll('tbody tr')].some(each => each.dataset.model === {json.dumps(name)})"
            )
        assert "taken" not in await page.run("document.title")
    finally:
        made_up.know(before)


@pytest.mark.parametrize(
    ("language", "said"), [("de", ("Speicher", "Wechseln zu", "antwortend")), ("zh", ("内存", "切换到", "服务中"))]
)
async def test_the_page_speaks(page: Page, made_up: MadeUp, language: str, said: tuple[str, ...]) -> None:
    await page.go(made_up.url + "/#memory")
    await page.run(f"localStorage.setItem('flashd-language', '{language}')")
    try:
        await page.tell("Page.reload")
        for text in said:
            await page.until(has(text, "body"))
        assert (await page.run("document.documentElement.lang")).startswith(language)
        for view in VIEWS:
            await page.run(f"location.hash = '{view}'")
            await page.until(f"document.querySelector('.views [aria-current]').hash === '#{view}'")
            assert await page.run("document.documentElement.scrollWidth <= innerWidth")
    finally:
        await page.run("localStorage.clear()")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (320, True)], ids=["wide-light", "narrow-dark"])
async def test_nothing_keeps_anybody_out(page: Page, made_up: MadeUp, width: int, dark: bool) -> None:
    """axe-core has no findings in any view, and none needs scrolling sideways."""
    axe = resources.files("axe_core_python").joinpath("axe.min.js").read_text()
    await page.looks(width, dark=dark)
    await page.go(made_up.url + "/#memory")
    await page.run(axe + ";0")
    for view in VIEWS:
        await page.run(f"location.hash = '{view}'")
        await page.until(f"document.querySelector('.views [aria-current]').hash === '#{view}'")
        await page.until("document.getAnimations().length === 0")
        if view == "settings":
            await page.until("document.querySelectorAll('.settings dt').length > 20")
        found = await page.run(
            "axe.run().then(({ violations }) => violations.map(each =>"
            " [each.id, each.nodes.map(node => node.html + ' ' + node.failureSummary)]))"
        )
        assert found == [], (view, json.dumps(found, indent=1)[:4000])
        assert await page.run("document.documentElement.scrollWidth <= innerWidth"), view


async def test_another_machine_is_asked_for_its_token(page: Page, made_up: MadeUp, tokens: TokenFile) -> None:
    made_up.is_far = True
    try:
        await page.tell("Page.navigate", url=made_up.url + "/#models")
        for secret in ("flashd-wrong", tokens.new("laptop", ["notes"])):
            await page.until("document.querySelector('[name=token]')?.value === ''")
            await page.type("[name=token]", secret)
            await page.press("Enter")
        await page.until("document.querySelectorAll('tbody tr').length === 1")
        await page.click("[aria-haspopup=menu]")
        await page.until(has("this token is for using models", ".menu"))
        tokens.revoke("laptop")
        await page.tell("Page.reload")
        await page.until("document.querySelector('[name=token]')")
    finally:
        made_up.is_far = False
        await page.run("sessionStorage.clear()")


async def test_the_page_can_be_switched_off(page: Page, made_up: MadeUp) -> None:
    before = made_up.directory
    gateway = replace(before.config.gateway, page=False)
    await page.go(made_up.url + "/#memory")
    made_up.know(replace(before, config=replace(before.config, gateway=gateway)))
    try:
        get = "fetch('{}', {{headers: {{accept: 'text/html'}}}}).then(answer => answer.text())"
        assert await page.run(get.format("/")) == "Ollama is running"
        for path in ("/flashd/v1/state", "/flashd/v1/events", "/flashd/v1/settings"):
            assert "gateway.page is false" in await page.run(get.format(path))
    finally:
        made_up.know(before)


async def test_a_gateway_that_ends_and_begins_again(page: Page, daemon: Daemon, tmp_path: Path) -> None:
    async with running_gateway(daemon, tmp_path / "first.log", daemon.runtime / "other.sock") as first:
        await page.go(first.url + "/#models")
    await page.until(has("The gateway does not answer"))
    async with running_gateway(daemon, tmp_path / "next.log", daemon.runtime / "other.sock", port=first.port):
        await page.until("!document.querySelector('.banner') && document.querySelectorAll('tbody tr').length === 3")


async def test_what_happened_is_saved_as_a_trace(page: Page, made_up: MadeUp, tmp_path: Path) -> None:
    result = {"how": "rebind", "from_tier": "device", "seconds": 0.03, "phases": {"loading": 0.01, "switching": 0.02}}
    said = {"Kind": "serve", "Subject": "notes", "State": "done", "Phase": "", "DoneBytes": 0, "TotalBytes": 0}
    said |= {"CreatedAt": time.time() - 1, "FinishedAt": time.time() - 0.97, "Result": result}
    made_up.happens("added", wire.job_path(901), wire.JOB, said)
    await page.tell("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    await page.go(made_up.url + "/#activity")
    await page.until(has("serve notes"))
    await page.run(
        "[...document.querySelectorAll('button')].find(e => e.textContent === 'Download as a trace').click()"
    )
    await eventually(lambda: list(tmp_path.glob("*.json")))
    (file,) = tmp_path.glob("*.json")
    found = {each["name"]: each for each in json.loads(file.read_text())["traceEvents"]}
    assert found["switching"]["dur"] == pytest.approx(20_000)
    assert found["serve notes"]["ts"] == pytest.approx(found["loading"]["ts"])
