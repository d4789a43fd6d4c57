# SPDX-License-Identifier: Apache-2.0
"""Drives Debian's Chromium by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from waiting import PATIENCE_S, eventually

CHROMIUM = shutil.which("chromium") or ""
_KEYS = {"Enter": ("\r", 13), "Tab": ("", 9), "Escape": ("", 27), "ArrowRight": ("", 39), "ArrowDown": ("", 40)}


@dataclass(slots=True)
class Page:
    """A tab. `faults` are the exceptions and errors of its console, such as breaches of the content policy."""

    socket: aiohttp.ClientWebSocketResponse
    faults: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    _number: int = 0
    _waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict)

    async def read(self) -> None:
        """Hears the browser until the tab is closed."""
        async for message in self.socket:
            said = json.loads(message.data)
            if (waiting := self._waiting.pop(said.get("id", 0), None)) is not None:
                if "error" in said:
                    waiting.set_exception(RuntimeError(said["error"]["message"]))
                else:
                    waiting.set_result(said["result"])
            elif said.get("method") == "Runtime.exceptionThrown":
                self.faults.append(json.dumps(said["params"]["exceptionDetails"]))
            elif said.get("method") == "Log.entryAdded" and said["params"]["entry"]["source"] != "network":
                self.faults.append(json.dumps(said["params"]["entry"]))
            elif said.get("method") == "Network.requestWillBeSent":
                self.hosts.add(said["params"]["request"]["url"].split("/")[2])

    async def tell(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        waiting = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": self._number, "method": method, "params": parameters})
        return await asyncio.wait_for(waiting, PATIENCE_S)

    async def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        found = await self.tell("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, code: str) -> None:
        """Waits for an expression to be true."""

        async def holds() -> bool:
            with contextlib.suppress(RuntimeError):  # the page is loaded again in this moment
                return bool(await self.run(f"Boolean({code})"))
            return False

        try:
            await eventually(holds)
        except AssertionError:
            raise AssertionError(f"{code}\n{await self.text()}\n{self.faults}") from None

    async def go(self, url: str) -> None:
        """Returns when the page knows the state of the machine."""
        await self.tell("Page.navigate", url=url)
        await self.until("document.querySelector('main .view') && document.querySelector('.link .is-good')")

    async def text(self, selector: str = "body") -> str:
        return str(await self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def click(self, selector: str) -> None:
        """Clicks on the first element that fits, once it is there."""
        found = f"document.querySelector({json.dumps(selector)})"
        await self.until(f"{found} && !{found}.disabled")
        await self.run(f"{found}.click()")

    async def type(self, selector: str, text: str) -> None:
        """Writes into a field, as a keyboard does."""
        await self.until(f"document.querySelector({json.dumps(selector)})")
        await self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        await self.run("document.activeElement.select?.()")
        await self.tell("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        text, code = _KEYS[key]
        known: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.tell("Input.dispatchKeyEvent", type="keyDown", text=text, **known)
        await self.tell("Input.dispatchKeyEvent", type="keyUp", **known)

    async def looks(self, width: int, *, dark: bool = False, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.tell("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.tell("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode((await self.tell("Page.captureScreenshot", format="png"))["data"])


@contextlib.asynccontextmanager
async def browser(profile: Path, language: str = "en") -> AsyncIterator[Page]:
    """Yields a tab of a browser that has this language. No request to another host leaves the machine."""
    process = subprocess.Popen(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-extensions", "--disable-background-networking", "--disable-component-update"),
            *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1", "--hide-scrollbars"),
            *(f"--lang={language}", f"--accept-lang={language}"),
            *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    listens_at = profile / "DevToolsActivePort"
    try:
        await eventually(lambda: listens_at.exists() and len(listens_at.read_text().split()) == 2)
        base = f"http://127.0.0.1:{listens_at.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            tabs = await (await session.get(f"{base}/json")).json()
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(re.sub("localhost", "127.0.0.1", address), max_msg_size=0) as socket:
                page = Page(socket)
                reading = asyncio.create_task(page.read())
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.tell(f"{domain}.enable")
                await page.tell("Emulation.setFocusEmulationEnabled", enabled=True)
                await page.looks(1280)
                yield page
                reading.cancel()
    finally:
        process.terminate()
        process.wait()
