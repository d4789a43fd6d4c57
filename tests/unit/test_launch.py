# SPDX-License-Identifier: Apache-2.0
"""Stopping a user's daemon: `flash stop` waits for its end."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import cast

import pytest

from flashd.client import launch
from flashd.client.client import Client
from flashd.config.paths import Scope, default_paths
from flashd.errors import Unavailable


class _Ended:
    """A client whose daemon ends at once."""

    bus = "session"

    def stop(self) -> None:
        pass

    def status(self) -> None:
        raise Unavailable("flashd is not running")


def test_stop_does_not_wait_for_a_keeper_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "_STOP_S", 0.1)
    runtime = default_paths(Scope.USER).runtime
    runtime.mkdir(parents=True)
    label = launch._label("session")
    left, alive, others = runtime / f"keeper.{label}.0", runtime / f"keeper.{label}.1", runtime / "keeper.another.0"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as killed:
        killed.bind(str(left))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as of_another_daemon:
        of_another_daemon.bind(str(others))
        launch.stop(cast(Client, _Ended()))
    assert not left.exists() and others.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(alive))
        with pytest.raises(Unavailable, match="still running"):
            launch.stop(cast(Client, _Ended()))
        assert alive.exists()
