# SPDX-License-Identifier: Apache-2.0
"""Commands that users of flashtensors are used to: other names for ours, and a token for the hub."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import Daemon, make_source
from test_cli import FLASH, flash

GOOD = "hf_" + "a" * 34


class Hub(BaseHTTPRequestHandler):
    """Knows one token."""

    def do_GET(self) -> None:
        is_known = self.headers.get("Authorization") == f"Bearer {GOOD}"
        body = json.dumps(
            {"type": "user", "name": "ada", "auth": {"accessToken": {"displayName": "test", "role": "read"}}}
            if is_known
            else {"error": "Invalid username or password."}
        ).encode()
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def auth(token: str, endpoint: str, home: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **changes}
    return subprocess.run(
        [FLASH, "auth", *arguments],
        input=token,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )  # fmt: skip


def test_a_token_is_kept_where_the_hubs_own_tools_find_it(hub: str, tmp_path: Path) -> None:
    done = auth(GOOD + "\n", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "token").read_text().strip() == GOOD
    assert GOOD not in done.stdout + done.stderr
    assert auth("", hub, tmp_path, "--logout").returncode == 0
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize(
    ("token", "status", "words"),
    [("hf_" + "b" * 34, 5, "does not accept"), ("", 2, "settings/tokens"), (GOOD, 13, "cannot be reached")],
)
def test_what_is_no_token_is_told_and_not_kept(token: str, status: int, words: str, hub: str, tmp_path: Path) -> None:
    endpoint = hub if status != 13 else "http://127.0.0.1:9"
    done = auth(token, endpoint, tmp_path)
    assert done.returncode == status and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "token").exists()


def test_models_and_remove(daemon: Daemon, tmp_path: Path) -> None:
    flash("import", make_source(tmp_path / "one"), "one", bus=daemon.address)
    assert "one" in flash("models", bus=daemon.address).stdout
    assert flash("remove", "one", "--yes", bus=daemon.address).returncode == 0
    assert json.loads(flash("models", "--json", bus=daemon.address).stdout) == []
