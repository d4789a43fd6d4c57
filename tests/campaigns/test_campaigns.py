# SPDX-License-Identifier: Apache-2.0
"""Every campaign, for a bounded time. Each has a seed of its own at every run; a failure says how to repeat it.

FLASHD_CAMPAIGN_SEED and FLASHD_CAMPAIGN_SECONDS set both.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SECONDS = float(os.environ.get("FLASHD_CAMPAIGN_SECONDS", "20"))
SEED = int(os.environ.get("FLASHD_CAMPAIGN_SEED") or random.SystemRandom().randrange(2**32))
LONGER_S = {
    "storm": 60.0,
    "crowd": 60.0,
}  # where the time goes by mostly with waiting for swaps, or for what was killed
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if '\nif __name__ == "__main__":' in path.read_text()]


@pytest.mark.timeout(max(SECONDS, *LONGER_S.values()) + 280)
@pytest.mark.parametrize("script", [pytest.param(path, id=path.stem) for path in SCRIPTS])
def test_a_campaign_finds_nothing(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seconds = max(SECONDS, LONGER_S.get(script.stem, 0.0))
    command = [sys.executable, str(script), "--seed", str(SEED), "--seconds", f"{seconds:g}"]
    with capfd.disabled():  # the seed stands in the output of a run that passes, too
        print(f" {script.stem} --seed {SEED} ", end="", flush=True)
    ran = subprocess.run(command, check=False, cwd=ROOT, text=True, capture_output=True, timeout=seconds + 270)
    again = f"tests/campaigns/{script.name} --seed {SEED} --seconds {seconds:g}\n"
    assert ran.returncode == 0, again + ran.stderr[-8000:] + ran.stdout[-2000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["campaign"] == script.stem and told["seed"] == SEED and told["findings"] == 0, again
    counted = sum(value for what, value in told.items() if what not in {"campaign", "seed", "seconds", "findings"})
    assert counted > 0, f"it tried nothing: {again}{ran.stderr[-8000:]}"
