# SPDX-License-Identifier: Apache-2.0
"""The native tests pass under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.timeout(1200)  # the build takes a while on a small machine that runs other tests as well
def test_sanitized() -> None:
    done = subprocess.run([Path(__file__).parent / "sanitize"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all native tests passed" in done.stdout
