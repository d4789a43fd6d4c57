# SPDX-License-Identifier: Apache-2.0
"""The README's first command, run as a new user runs it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(600)
def test_the_quick_start_shows_the_main_job_and_leaves_nothing_behind() -> None:
    before = {path.name for path in (ROOT / "build").glob("quickstart-*")}
    done = subprocess.run(
        [ROOT / "packaging" / "quickstart"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "I am Ada, the first model you dropped into the folder." in done.stdout
    assert "My name is Bob, a fine-tune of Ada with opinions of my own." in done.stdout
    assert "What it took" in done.stdout
    assert {path.name for path in (ROOT / "build").glob("quickstart-*")} == before
