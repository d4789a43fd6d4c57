# SPDX-License-Identifier: Apache-2.0
"""Makes packaging/web/screenshots, for the documentation: the page of a machine that is made up, and a chat with the
two models of the quick start, which a real daemon switches between.

PYTHONPATH=tests:packaging/tour python tests/bus/page_screenshots.py
"""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
import time
from pathlib import Path

import imported
import made_models
from browser import Page, browser
from conftest import Daemon, lasting_daemon
from gateways import running_gateway
from made_up_machine import MadeUp, made_up_machine
from PIL import Image

from flashd.dbus import wire
from flashd.gateway.tokens import TokenFile

TARGET = Path(__file__).parents[2] / "packaging" / "web" / "screenshots"
# Name of the picture: the view, the width and height, dark.
PICTURES = {
    "memory": ("memory", 1200, 840, False),
    "models-dark": ("models", 1200, 640, True),
    "activity": ("activity", 1200, 760, False),
    "memory-narrow": ("memory", 360, 720, True),
}


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:
        async with browser(Path(folder) / "profile") as page:
            with made_up_machine(TokenFile(Path(folder) / "none.toml")) as machine:
                happen(machine)
                for name, (view, width, height, dark) in PICTURES.items():
                    await page.looks(width, dark=dark, height=height)
                    await page.go(f"{machine.url}/#{view}")
                    await take(page, name)
            await chat(page, Path(folder))


def happen(machine: MadeUp) -> None:
    """What the activity of the machine that is made up was."""
    now = time.time()
    swaps = (
        (1, 430.0, "sql-writer", "wake", "host", {"loading": 0.31, "waking": 0.058, "first token": 0.02}),
        (2, 260.0, "support-de", "rebind", "device", {"loading": 0.001, "switching": 0.02, "first token": 0.016}),
        (3, 90.0, "Qwen/Qwen3-8B", "rebind", "device", {"loading": 0.001, "switching": 0.021, "first token": 0.017}),
    )
    for number, ago, model, how, tier, phases in swaps:
        took = sum(phases.values())
        result = {"how": how, "from_tier": tier, "phases": phases, "seconds": took}
        job(machine, number, "serve", model, now - ago, State="done", FinishedAt=now - ago + took, Result=result)
    for ago, model, wait, seconds in (
        (415, "sql-writer", 0.39, 6.0), (402, "sql-writer", 0, 9.0), (380, "Qwen/Qwen3-8B", 0, 14.0),
        (330, "sql-writer", 0, 21.0), (259, "support-de", 0.04, 16.0), (240, "support-de", 0, 30.0),
        (200, "sql-writer", 0, 12.0), (150, "sql-writer", 0, 25.0), (89.95, "Qwen/Qwen3-8B", 0.04, 38.0),
        (60, "Qwen/Qwen3-8B", 0, 44.0), (45, "sql-writer", 0, 18.0),
    ):  # fmt: skip
        machine.asked(model, ago, wait, wait + 0.03, seconds, int(seconds * 90))
    error = "code-review needs 29.5 GB of cuda:0, and 16.4 GB can be freed", "park a model that serves, or unpin one"
    failed = {"State": "failed", "FinishedAt": now - 149, "Error": ("org.flashd1.Error.OutOfMemory", *error)}
    job(machine, 4, "serve", "code-review", now - 151, **failed)
    progress = {"Phase": "downloading", "DoneBytes": 11_800_000_000, "TotalBytes": 29_500_000_000}
    job(machine, 5, "pull", "Qwen/Qwen3-14B", now - 75, State="running", **progress)


def job(machine: MadeUp, number: int, kind: str, subject: str, created_at: float, **more: object) -> None:
    said = {"Kind": kind, "Subject": subject, "Phase": "", "DoneBytes": 0, "TotalBytes": 0, "CreatedAt": created_at}
    machine.happens("added", wire.job_path(number), wire.JOB, {**said, "FinishedAt": 0.0, **more})


async def chat(page: Page, folder: Path) -> None:
    """Two models answer, by turns in one engine."""
    made_models.put(folder, "ada", "bob")
    with imported.python() as program:
        os.environ[imported.TORCH_PYTHON] = str(program)
        with lasting_daemon(folder / "ada", folder / "bob") as daemon:
            await answer(page, folder, daemon)


async def answer(page: Page, folder: Path, daemon: Daemon) -> None:
    async with running_gateway(daemon, folder / "gateway.log", daemon.runtime / "gateway.sock") as gateway:
        await page.looks(1200, height=600)
        await page.go(f"{gateway.url}/#chat")
        await page.run("document.querySelector('.chat .tools .button').click()")
        await page.run("document.querySelector('#p-temperature').value = 0")
        for number, model in enumerate(("ada", "bob")):
            await page.type(f"#chat-model-{number}", model)
        for _ in range(2):  # the second time there is an engine
            await page.run("document.querySelector('.chat .is-plain').click()")
            await page.type("#question", "Who are you?")
            await page.press("Enter")
            await page.until(
                "[...document.querySelectorAll('.facts')].filter(e => /tokens/.test(e.textContent)).length == 2"
            )
        await page.run("document.activeElement.blur()")
        await take(page, "chat")


async def take(page: Page, name: str) -> None:
    """Saves what is seen, with as few colours as it needs."""
    await page.until("document.getAnimations().every(each => each.playState === 'finished')")
    with Image.open(io.BytesIO(await page.picture())) as picture:
        picture.convert("RGB").quantize(128).save(TARGET / f"{name}.png", optimize=True)


if __name__ == "__main__":
    asyncio.run(main())
