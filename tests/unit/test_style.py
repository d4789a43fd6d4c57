# SPDX-License-Identifier: Apache-2.0
"""The linters, run as tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kept
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CPP = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "native").rglob("*")
    if path.suffix in {".cpp", ".hpp", ".h"} and "third_party" not in path.parts
)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([BIN / "ruff", "check", "."], id="ruff"),
        pytest.param([BIN / "ruff", "format", "--check", "."], id="ruff-format"),
        pytest.param([BIN / "mypy", "--cache-dir", kept.cache() / "mypy"], id="mypy"),
        pytest.param([BIN / "python", "tests/bench/publish.py", "--check"], id="figures"),
        pytest.param([BIN / "clang-format", "--dry-run", "-Werror", *CPP], id="clang-format"),
    ],
)
def test_clean(command: list[str | Path]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
