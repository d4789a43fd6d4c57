# SPDX-License-Identifier: Apache-2.0
"""The storm of tests/campaigns with vLLM engines; test_campaigns.py runs it with torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parents[1] / "campaigns" / "storm.py"


@pytest.mark.timeout(300)
def test_every_answer_is_its_models_own(imported_vllm: str, compiled: Path) -> None:
    command = [sys.executable, STORM, "--seconds", "60", "--engine", "vllm"]
    command += ["--python", imported_vllm, "--compiled", str(compiled)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-8000:] + ran.stdout
    counted = json.loads(ran.stdout.splitlines()[-1])
    assert counted["swaps"] > 5 and counted["answers"] > 5, counted
