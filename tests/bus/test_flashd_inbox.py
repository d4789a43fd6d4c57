# SPDX-License-Identifier: Apache-2.0
"""flashd-inbox beside a daemon that watches another folder: the only way from a home into the machine's store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Daemon, Remote, make_source
from waiting import PATIENCE_S, eventually

from flashd.dbus import wire

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    config = tmp_path / "home" / ".config" / "flashd"
    config.mkdir(parents=True)
    (config / "flashd.toml").write_text("[inbox]\nsettle_s = 0.2\nrescan_s = 1.0\n")
    return tmp_path / "home"


@pytest.fixture
def start(home: Path, daemon: Daemon) -> Iterator[Start]:
    """Starts one; all end with success in the end, and without a traceback."""
    running: list[subprocess.Popen[bytes]] = []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")} | {"HOME": str(home)}
    command = [sys.executable, "-m", "flashd.user_inbox", "--bus", daemon.address, "--retry-s", "0.3"]

    def begin() -> subprocess.Popen[bytes]:
        with (home / "log").open("ab") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=PATIENCE_S) == 0
    assert "Traceback" not in said(home)


def said(home: Path) -> str:
    return (home / "log").read_text()


async def test_what_settles_is_handed_over_once_and_again_when_it_changes(
    start: Start, home: Path, remote: Remote
) -> None:
    make_source(home / "models" / "team" / "mine", seed=1, shards=20)  # more files than one message carries
    start()
    first = await remote.model("team/mine")
    assert first["Source"] == f"imported by user {os.getuid()}"
    await eventually(lambda: "is a model" in said(home))

    start().send_signal(signal.SIGTERM)
    shutil.rmtree(home / "models" / "team" / "mine")
    make_source(home / "models" / "team" / "mine", seed=2)

    async def is_new() -> bool:
        return (await remote.model("team/mine"))["Checkpoint"] != first["Checkpoint"]

    await eventually(is_new)


async def test_another_start_hands_nothing_over_again(start: Start, home: Path, remote: Remote) -> None:
    make_source(home / "models" / "mine", seed=1)
    process = start()
    await eventually(lambda: "mine is a model" in said(home))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_S) == 0
    make_source(home / "models" / "other", seed=2)
    start()
    await eventually(lambda: "other is a model" in said(home))
    assert said(home).count("mine is a model") == 1


async def test_it_waits_for_a_daemon_that_is_not_there(start: Start, home: Path, daemon: Daemon) -> None:
    assert daemon.stop() == 0
    make_source(home / "models" / "mine", seed=1)
    start()
    await eventually(lambda: "mine has to wait" in said(home))
    daemon.start()
    await eventually(lambda: "mine is a model" in said(home))
    assert said(home).count("has to wait") == 1, "it is said once"


async def test_a_model_of_somebody_elses_making_is_not_replaced(
    start: Start, home: Path, daemon: Daemon, remote: Remote
) -> None:
    make_source(daemon.models / "taken", seed=1)
    theirs = await remote.model("taken")
    make_source(home / "models" / "taken", seed=2)
    make_source(home / "models" / "free", seed=3)
    start()
    await eventually(lambda: "free is a model" in said(home))
    await eventually(lambda: "taken does not become a model" in said(home))
    assert (await remote.all(wire.model_path("taken"), wire.MODEL))["Checkpoint"] == theirs["Checkpoint"]


async def test_what_is_malformed_is_offered_once(start: Start, home: Path, remote: Remote) -> None:
    source = make_source(home / "models" / "broken", seed=1)
    os.truncate(source / "model.safetensors", 100)
    process = start()
    await eventually(lambda: "broken does not become a model" in said(home))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=PATIENCE_S)
    make_source(home / "models" / "good", seed=2)
    start()
    await eventually(lambda: "good is a model" in said(home))
    assert said(home).count("broken does not become a model") == 1


async def test_an_inbox_may_make_private_models_and_what_was_said_since_stays_so(
    start: Start, home: Path, remote: Remote
) -> None:
    settings = home / ".config" / "flashd" / "flashd.toml"
    settings.write_text(settings.read_text() + "private = true\n")
    make_source(home / "models" / "mine", seed=1)
    start()
    first = await remote.model("mine")
    assert (first["Private"], first["OwnerUid"]) == (True, os.getuid())
    await eventually(lambda: "mine is a model" in said(home))
    await remote.call("SetPrivate", "b", False, path=wire.model_path("mine"), interface=wire.MODEL)
    shutil.rmtree(home / "models" / "mine")
    make_source(home / "models" / "mine", seed=2)

    async def is_new() -> bool:
        return (await remote.model("mine"))["Checkpoint"] != first["Checkpoint"]

    await eventually(is_new)
    assert (await remote.model("mine"))["Private"] is False
